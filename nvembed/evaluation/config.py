"""Configuration of evaluation."""

from typing import Literal

from pydantic import Field, model_validator

from nvembed.retrieval.config import EncodeConfig, PackageModel, RetrieverConfig
from nvembed.types import Config


class EvaluateConfig(Config):
    """The `evaluate` step: one model on every held-out set. Tune on dev, report on test."""

    split: Literal["dev", "test"] = Field(
        "test", description="Held-out split that is scored: dev to tune on, test to report."
    )
    dims: tuple[int, ...] = Field((), description="Matryoshka prefixes scored besides the full width.")
    encode: EncodeConfig = Field(
        EncodeConfig(), description="Encoding of the held-out texts: actors, precision, vector type, cache."
    )
    bootstrap_samples: int = Field(1000, ge=100, description="Draws of the bootstrap behind each 95 % interval.")
    neighbours: int = Field(5, ge=1, description="k of k-NN classification.")
    clusterings: int = Field(5, ge=1, description="k-means runs (seeds) whose v-measures are averaged.")
    seed: int = Field(
        0,
        ge=0,
        description="Seed of the bootstrap and of k-means; for `baselines` also of the dev comparison's sample.",
    )


class BaselineConfig(Config):
    """The `baselines` step: BM25, an off-the-shelf embedder, the untrained backbone at its best (chosen on dev)."""

    reference: RetrieverConfig = Field(
        PackageModel(), description="Off-the-shelf embedder that is scored beside BM25 and the untrained backbone."
    )
    dev_documents: int = Field(300, ge=10, description="Corpus cap in the dev comparison of the untrained variants.")
    dev_queries: int = Field(
        100,
        ge=5,
        description="Cap on queries, labelled texts or pairs in the dev comparison of the untrained variants.",
    )
    evaluate: EvaluateConfig = Field(
        EvaluateConfig(), description="Evaluation of the baselines; its `dims` must stay empty."
    )

    @model_validator(mode="after")
    def _no_prefixes(self) -> "BaselineConfig":
        if self.evaluate.dims:
            raise ValueError(
                "evaluate.dims has no meaning for the baselines, which have no trained prefixes; remove it"
            )
        return self
