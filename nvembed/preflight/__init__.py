"""What a run's cluster has to be like, looked at before any GPU time is spent (layer 6)."""
