"""Configuration of mining."""

from typing import Annotated, Literal

from pydantic import Field

from nvembed.retrieval.config import EncodeConfig, MinerConfig, PackageModel, SearchConfig
from nvembed.types import Config


class TopKPercPos(Config):
    """NV-Retriever's TopK-PercPos: keep candidates with s < p - (1 - share) * |p|, p the lowest positive's score."""

    type: Literal["topk_perc_pos"] = "topk_perc_pos"
    share: float = Field(0.95, gt=0, le=1)


class RandomNegatives(Config):
    """Uniform draw from the corpus, known positives excluded; the control in the mined-against-random measurement."""

    type: Literal["random"] = "random"


RuleConfig = Annotated[TopKPercPos | RandomNegatives, Field(discriminator="type")]


class MineConfig(Config):
    """The `mine` step."""

    miner: MinerConfig = PackageModel()
    rule: RuleConfig = TopKPercPos()
    num_negatives: int = Field(8, ge=1, description="Kept per example.")
    depth: int = Field(50, ge=1, description="Candidates searched per query.")
    sts_positive: float = Field(
        0.8, ge=0, le=1, description="sts pairs at or above this are positives, both directions."
    )
    encode: EncodeConfig = EncodeConfig()
    search: SearchConfig = SearchConfig()
    audit_samples: int = Field(0, ge=0, description="Texts shown in the audit; private by default.")
    seed: int = 0
