"""Preflight: checks of this machine and of every node, before the first step."""
