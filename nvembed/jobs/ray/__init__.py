"""Jobs on an existing Ray cluster, through the Ray Jobs API."""
