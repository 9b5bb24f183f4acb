"""Configuration of distillation."""

from pydantic import Field

from nvembed.retrieval.config import EncodeConfig
from nvembed.types import Config


class TeachConfig(Config):
    """The `teach` step: the teacher's vectors of training queries and documents, written once to shards.

    `holdout_share` of the texts is kept out of the student's stream to measure the cosine to the teacher.
    """

    encode: EncodeConfig = EncodeConfig()
    max_texts: int | None = Field(None, ge=10)
    holdout_share: float = Field(0.05, gt=0, lt=0.5)
    seed: int = 0
