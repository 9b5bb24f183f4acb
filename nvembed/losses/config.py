"""Configuration of the objectives."""

from typing import Annotated, Literal

from pydantic import Field

from nvembed.types import Config


class ContrastiveConfig(Config):
    """InfoNCE over hard negatives and, with `in_batch`, the documents of the whole global batch (NV-Embed eq. 1).

    `query_negatives` adds other queries as negatives (Gecko). `matryoshka_dims`: prefixes trained besides the full
    width. Known positives of a query never count as its negatives.
    """

    type: Literal["contrastive"] = "contrastive"
    in_batch: bool = True
    query_negatives: bool = False
    temperature: float = Field(0.02, gt=0)
    learned_temperature: bool = False
    matryoshka_dims: tuple[int, ...] = ()


class DistillConfig(Config):
    """1 - cos(W s, t) with the student projected up to the teacher's width, on the full student and every prefix."""

    type: Literal["distill"] = "distill"
    matryoshka_dims: tuple[int, ...] = ()
    cosine_weight: float = Field(1.0, ge=0)
    similarity_weight: float = Field(
        0.0, ge=0, description="MSE between student and teacher similarity matrices (Jasper)."
    )


ObjectiveConfig = Annotated[ContrastiveConfig | DistillConfig, Field(discriminator="type")]
