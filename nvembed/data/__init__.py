"""Layer 2: sources, splits without leakage, and the training stream."""
