"""Configuration of the objectives."""

from typing import Annotated, Literal

from pydantic import Field

from nvembed.types import Config


class ContrastiveConfig(Config):
    """InfoNCE over hard negatives and, with `in_batch`, the documents of the whole global batch (NV-Embed eq. 1).

    `query_negatives` adds other queries as negatives (Gecko). `matryoshka_dims`: prefixes trained besides the full
    width. Known positives of a query never count as its negatives.
    """

    type: Literal["contrastive"] = Field("contrastive", description="Kind of the objective.")
    in_batch: bool = Field(
        True,
        description="Contrast a query with all documents of the global batch; false: with its hard negatives only.",
    )
    query_negatives: bool = Field(
        False, description="Contrast a query also with the other queries of the global batch (Gecko)."
    )
    temperature: float = Field(
        0.02,
        gt=0,
        description="Temperature of InfoNCE: cosines are divided by it; its first value where it is learned.",
    )
    learned_temperature: bool = Field(
        False, description="Train the temperature, as its logarithm; false: it stays as given."
    )
    matryoshka_dims: tuple[int, ...] = Field(
        (), description="Widths of the prefixes trained besides the full embedding (Matryoshka)."
    )


class DistillConfig(Config):
    """1 - cos(W s, t) with the student projected up to the teacher's width, on the full student and every prefix."""

    type: Literal["distill"] = Field("distill", description="Kind of the objective.")
    matryoshka_dims: tuple[int, ...] = Field(
        (), description="Widths of the prefixes trained besides the full embedding (Matryoshka)."
    )
    cosine_weight: float = Field(
        1.0, ge=0, description="Weight of the cosine distance of projected student and teacher embeddings."
    )
    similarity_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the mean squared difference of student and teacher similarity matrices (Jasper).",
    )


ObjectiveConfig = Annotated[ContrastiveConfig | DistillConfig, Field(discriminator="type")]
