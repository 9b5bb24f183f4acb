"""Hard negatives: selection rules, the `mine` step, the audit, `mine_vectors` on plain arrays."""
