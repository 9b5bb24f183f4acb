"""Configuration of tracking."""

from __future__ import annotations

from nvembed.types import Config


class TrackingConfig(Config):
    """MLflow tracking.

    `uri` null: MLFLOW_TRACKING_URI where it is set, else `mlflow.db` and `mlartifacts/` below the (local) output.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "nvembed"
