"""Exact inner-product search in bounded memory."""
