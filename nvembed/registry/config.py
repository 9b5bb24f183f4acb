"""Configuration of registration and of the gate before `champion`."""

from typing import Annotated

from pydantic import Field

from nvembed.types import Config


class GateConfig(Config):
    """The gate before `champion`. Differences are paired, over the same items, of primary metrics."""

    margin: float = Field(
        0.01,
        ge=0,
        le=1,
        description="The lower end of the 95 % interval of the mean difference to the champion must be at least minus "
        "this; with 0 it must be above 0.",
    )
    floor: float = Field(0.03, ge=0, le=1, description="Largest loss against the champion on any single data set.")
    floors: dict[str, Annotated[float, Field(ge=-1, le=1)]] = Field(
        default_factory=dict, description="Data set -> lowest primary score, with or without a champion."
    )
    samples: int = Field(1000, ge=100, description="Draws of the bootstrap.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")


class RegisterConfig(Config):
    """Names in the registry, whether the run may move `champion`, and the gate before that."""

    enabled: bool = Field(True, description="Register the models of the run.")
    teacher_name: str = Field("nvembed-teacher", pattern=r"^[\w\-. ]+$", description="Registered model of the teacher.")
    student_name: str = Field("nvembed-student", pattern=r"^[\w\-. ]+$", description="Registered model of the student.")
    auto_promote: bool = Field(False, description="Move champion to a version that passes the gate.")
    gate: GateConfig = Field(GateConfig(), description="The checks that a version must pass to become champion.")


class RegistrationConfig(Config):
    """The `register` step of one model.

    Addresses are no part of its fingerprint: a registry that is gone for good does not change the identity of a
    finished step.
    """

    model_name: str = Field(description="Name of the registered model.")
    recipe_name: str = Field(description="Name of the recipe.")
    auto_promote: bool = Field(False, description="Move champion to a version that passes the gate.")
    gate: GateConfig = Field(GateConfig(), description="The checks that a version must pass to become champion.")
    experiment: str = Field("nvembed", description="MLflow experiment of the run.")
    registry: str | None = Field(
        None, exclude=True, description="The configured tracking URI; null: the output's own store."
    )
    # the default lets a published config be read back
    tracking_uri: str = Field("", exclude=True, description="URI of MLflow's tracking and registry.")
    artifact_root: str | None = Field(None, exclude=True, description="Where a new experiment stores its artifacts.")
    run_id: str | None = Field(None, exclude=True, description="MLflow run of the step; null makes one.")
