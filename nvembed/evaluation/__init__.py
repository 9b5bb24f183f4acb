"""Layer 4: metrics, tasks, baselines and significance."""
