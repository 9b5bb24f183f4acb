"""MLflow runs and metrics."""
