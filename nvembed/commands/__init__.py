"""The commands of `nvembed`, one file each; `app.py` puts them together."""
