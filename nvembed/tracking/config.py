"""Configuration of tracking."""

from __future__ import annotations

from pydantic import Field

from nvembed.types import Config


class TrackingConfig(Config):
    """MLflow tracking."""

    enabled: bool = Field(True, description="Send runs and metrics to MLflow.")
    uri: str | None = Field(
        None,
        description="Tracking URI; null: MLFLOW_TRACKING_URI, else mlflow.db and mlartifacts/ in the (local) output.",
    )
    experiment: str = Field("nvembed", description="MLflow experiment of the runs.")
