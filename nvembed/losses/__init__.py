"""Layer 1: losses and objectives over tensors (torch only)."""
