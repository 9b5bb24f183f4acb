"""Configuration of evaluation."""

from typing import Literal

from pydantic import Field, model_validator

from nvembed.retrieval.config import EncodeConfig, PackageModel, RetrieverConfig
from nvembed.types import Config


class EvaluateConfig(Config):
    """The `evaluate` step: one model on every held-out set. Tune on dev, report on test."""

    split: Literal["dev", "test"] = "test"
    dims: tuple[int, ...] = Field((), description="Matryoshka prefixes scored besides the full width.")
    encode: EncodeConfig = EncodeConfig()
    bootstrap_samples: int = Field(1000, ge=100)
    neighbours: int = Field(5, ge=1, description="k of k-NN classification.")
    clusterings: int = Field(5, ge=1, description="k-means runs (seeds) whose v-measures are averaged.")
    seed: int = 0


class BaselineConfig(Config):
    """The `baselines` step: BM25, an off-the-shelf embedder, the untrained backbone at its best (chosen on dev)."""

    reference: RetrieverConfig = PackageModel()
    dev_documents: int = Field(300, ge=10, description="Corpus cap in the dev comparison of the untrained variants.")
    dev_queries: int = Field(100, ge=5)
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _no_prefixes(self) -> "BaselineConfig":
        if self.evaluate.dims:
            raise ValueError(
                "evaluate.dims has no meaning for the baselines, which have no trained prefixes; remove it"
            )
        return self
