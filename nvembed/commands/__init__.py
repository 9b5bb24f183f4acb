"""The commands of `nvembed`, one file each (layer 6); `cli.py` puts them together."""
