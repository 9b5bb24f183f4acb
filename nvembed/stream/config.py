"""Configuration of the training streams."""

from typing import Literal

from pydantic import Field

from nvembed.types import Config


class StreamConfig(Config):
    """The training stream of one stage: which data sets, in what proportion, in which order.

    Each example's (optimiser step, slot) is a pure function of the input manifests, the weights and the seed.
    `batching`: "homogeneous" takes each global batch from one data set, "blended" mixes all (NV-Embed stage 2).

    The share of a data set is weight x n ** size_exponent, n its usable examples after its cap: 0 takes the weights as
    they are, 1 makes every example equally frequent, between them small sets are raised (temperature sampling).
    """

    weights: dict[str, float] = Field(min_length=1, description="data set -> share of the examples")
    caps: dict[str, int] = Field({}, description="data set -> examples of it that are used at most, by seeded hash")
    size_exponent: float = Field(0.0, ge=0, le=1)
    steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    num_negatives: int = Field(1, ge=0)
    batching: Literal["homogeneous", "blended"] = "homogeneous"
    seed: int = 0


class DistillStreamConfig(Config):
    """The stream of teacher vectors for the student: (text, instruction, vector) rows in a seeded order."""

    steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    seed: int = 0
