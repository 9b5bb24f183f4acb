"""Data sets: sources, deduplication, splits without leakage, the `prepare` step, writers of other formats."""
