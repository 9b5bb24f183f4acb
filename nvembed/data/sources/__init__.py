"""Readers: each turns one kind of source into corpus rows and examples."""
