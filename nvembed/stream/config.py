"""Configuration of the training streams."""

from typing import Annotated, Literal

from pydantic import Field

from nvembed.types import Config


class StreamConfig(Config):
    """The training stream of one stage: which data sets, in what proportion, in which order.

    Each example's (optimiser step, slot) is a pure function of the input manifests, the weights and the seed.
    `batching`: "homogeneous" takes each global batch from one data set, "blended" mixes all (NV-Embed stage 2).

    The share of a data set is weight x n ** size_exponent, n its usable examples after its cap: 0 takes the weights as
    they are, 1 makes every example equally frequent, between them small sets are raised (temperature sampling).
    """

    weights: dict[str, float] = Field(
        min_length=1,
        description="Data set -> weight; its share of the examples is in proportion to weight x size ** size_exponent.",
    )
    caps: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="Data set -> most examples of it that are used, sampled by seeded hash."
    )
    size_exponent: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Exponent of the sizes in the shares: 0 takes the weights alone, 1 the weights times the sizes.",
    )
    steps: int = Field(ge=1, description="Optimiser steps of the stage.")
    global_batch_size: int = Field(ge=1, description="Examples of one optimiser step, over all ranks.")
    num_negatives: int = Field(
        1, ge=0, description="Hard negatives of an example, sampled from the mined and given ones."
    )
    batching: Literal["homogeneous", "blended"] = Field(
        "homogeneous",
        description="Data sets of a global batch: one (homogeneous), or all (blended, as in NV-Embed's stage 2).",
    )
    seed: int = Field(0, ge=0, description="Seed of order, caps, positives and negatives.")


class DistillStreamConfig(Config):
    """The stream of teacher vectors for the student: (text, instruction, vector) rows in a seeded order."""

    steps: int = Field(ge=1, description="Optimiser steps of the student's training.")
    global_batch_size: int = Field(ge=1, description="Texts of one optimiser step, over all ranks.")
    seed: int = Field(0, ge=0, description="Seed of the order.")
