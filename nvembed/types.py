"""The types that every package shares: examples, batches, artifacts, configuration, errors; free of torch and ray.

Shapes: B examples of a global batch, G texts per example (query, positive, negatives), T = B * G texts.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

VectorType = Literal["fp32", "fp16", "bf16", "int8"]  # how embeddings are stored


class UserError(ValueError):
    """A mistake of the user: the message says what was wrong, where, and what to do. Exit code 2."""


class Config(BaseModel):
    """Base of every configuration section: unknown keys are errors, numbers are finite, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TaskType(enum.StrEnum):
    """Task of an example; it decides the source of negatives and whether documents carry the instruction."""

    RETRIEVAL = "retrieval"
    CLASSIFICATION = "classification"
    CLUSTERING = "clustering"
    STS = "sts"

    @property
    def symmetric(self) -> bool:
        """True where query and document are the same kind of text, so both carry the instruction (NV-Embed 4.2)."""
        return self is not TaskType.RETRIEVAL

    @property
    def labelled(self) -> bool:
        """True where examples are texts with a class: classification and clustering."""
        return self in (TaskType.CLASSIFICATION, TaskType.CLUSTERING)


@dataclass(frozen=True, slots=True)
class ScoredId:
    """A document of the data set's corpus by id, with the score it was chosen by (None: a given label)."""

    id: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """One row of `examples-<split>.parquet`; `positives` and `negatives` are ids into the data set's corpus.

    `score` of a positive is the graded similarity (0-1) for sts rows. `label` is the class for classification rows.
    """

    id: str
    dataset: str
    task: TaskType
    query: str
    positives: tuple[ScoredId, ...] = ()
    negatives: tuple[ScoredId, ...] = ()
    label: str | None = None
    teacher_scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Batch:
    """One global batch, whole and in order, before it is divided over ranks.

    Attributes:
        step: optimiser step (0-based), the position in the data.
        example_ids: B ids in slot order; their hash is in `metrics.jsonl`.
        texts: T texts, example-major: text t belongs to example t // G, role t % G (query, positive, negatives).
            A missing negative is the empty string with `present` false.
        instructions: T prefixes ("" for bare documents); a model input is `instruction + text`.
        token_lengths: int32 [T], tokens of instruction + text with BOS/EOS, truncated at max_length; 0 where absent.
        present: bool [B, G].
        document_ids: int64 [B, G], hash of (dataset, document id); 0 in the query's column.
        positive_ids: B arrays of int64: every known positive of the example's query, for false-negative masks.
        teacher_vectors: float32 [B, D_teacher] for distillation (G = 1), else None.
    """

    step: int
    example_ids: Sequence[str]
    texts: Sequence[str]
    instructions: Sequence[str]
    token_lengths: np.ndarray
    present: np.ndarray
    document_ids: np.ndarray
    positive_ids: Sequence[np.ndarray]
    teacher_vectors: np.ndarray | None = None

    @property
    def batch_size(self) -> int:
        """B, the examples of the global batch."""
        return self.present.shape[0]

    @property
    def group_size(self) -> int:
        """G, the texts of one example."""
        return self.present.shape[1]


@dataclass(frozen=True)
class Artifact:
    """A published result of a pipeline step: a directory at `uri` whose `manifest.json` was written last."""

    uri: str
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Hash of (step, logic version, config, input manifests): a step with the same one is skipped."""
        return str(self.manifest["fingerprint"])

    @property
    def manifest_hash(self) -> str:
        """Hash of the manifest's content part (files and fingerprint; not timings); what later steps depend on."""
        return str(self.manifest["content_hash"])

    def path(self, *parts: str) -> str:
        """URI of a file inside the artifact."""
        return "/".join((self.uri.rstrip("/"), *parts))
