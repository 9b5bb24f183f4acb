"""Configuration of registration and of the gate before `champion`."""

from pydantic import Field

from nvembed.types import Config


class GateConfig(Config):
    """What a version must show to become champion. Differences are paired, over the same items, of primary metrics."""

    margin: float = Field(
        0.01,
        ge=0,
        le=1,
        description="The mean difference to the champion must not be below minus this with 97.5 % confidence; "
        "0 asks for a version that is better.",
    )
    floor: float = Field(0.03, ge=0, le=1, description="Largest loss against the champion on any one data set.")
    floors: dict[str, float] = Field(
        default_factory=dict, description="data set -> lowest primary score, champion or not."
    )
    samples: int = Field(1000, ge=100, description="Draws of the bootstrap.")
    seed: int = 0


class RegisterConfig(Config):
    """Names in the registry, whether the run may move `champion`, and what a version must show for that."""

    enabled: bool = True
    teacher_name: str = Field("nvembed-teacher", pattern=r"^[\w\-. ]+$")
    student_name: str = Field("nvembed-student", pattern=r"^[\w\-. ]+$")
    auto_promote: bool = False
    gate: GateConfig = GateConfig()


class RegistrationConfig(Config):
    """The `register` step of one model. What only says where things lie is no part of its fingerprint: a registry that
    is gone for good does not make what was done another run."""

    model_name: str
    recipe_name: str
    auto_promote: bool = False
    gate: GateConfig = GateConfig()
    experiment: str = "nvembed"
    registry: str | None = Field(
        None, exclude=True, description="The configured tracking URI; null: the output's own store."
    )
    tracking_uri: str = Field("", exclude=True)  # a default, so that a published config can be read back
    artifact_root: str | None = Field(None, exclude=True)
    run_id: str | None = Field(None, exclude=True, description="The step's run; null makes one.")
