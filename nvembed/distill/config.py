"""Configuration of distillation."""

from pydantic import Field

from nvembed.retrieval.config import EncodeConfig
from nvembed.types import Config


class TeacherEmbeddingsConfig(Config):
    """The `teacher_embeddings` step: the teacher's embeddings of training queries and documents, written once.

    `holdout_share` of the texts is left out of the student's stream to measure the cosine to the teacher.
    """

    encode: EncodeConfig = Field(
        EncodeConfig(), description="Encoding of the texts with the teacher: actors, precision, vector type, cache."
    )
    max_texts: int | None = Field(
        None, ge=10, description="Most texts that the teacher embeds, sampled by seeded hash; null: all."
    )
    holdout_share: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="Share of the texts that the student never sees, to measure its cosine to the teacher.",
    )
    seed: int = Field(0, ge=0, description="Seed of the sample of texts and of the holdout.")


class CompareConfig(Config):
    """The `compare_student` step: cosine on the holdout, sizes, and CPU seconds of encoding the same texts in turns."""

    holdout_texts: int = Field(
        2000, ge=8, description="Most texts of the holdout whose cosine to the teacher is taken."
    )
    texts: int = Field(256, ge=8, description="Texts encoded by teacher and student in the cost measurement.")
    repeats: int = Field(3, ge=1, description="Interleaved rounds; the median counts.")
    threads: int = Field(1, ge=1, description="CPU threads of teacher and student.")
    precision: str = Field(
        "auto",
        pattern="^(auto|fp32|bf16)$",
        description="Precision of teacher and student; auto: bf16 where the processor has it, else fp32.",
    )
    bootstrap_samples: int = Field(1000, ge=100, description="Draws of the bootstrap behind each 95 % interval.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")
