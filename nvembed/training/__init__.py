"""Layer 3: the one training loop, its engines, checkpoints and the Ray Train launch."""
