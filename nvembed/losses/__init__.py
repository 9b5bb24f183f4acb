"""Losses and objectives over tensors (torch only)."""
