"""Held-out metrics with intervals, the steps `evaluate` and `baselines`, and an mteb adapter."""
