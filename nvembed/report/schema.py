"""The shape of `report.json` (pydantic only). What outside checks rely on comes first, what this library adds after.

Scores are 0-1 (Spearman: -1 to 1); the primary metric of a data set stands first; intervals are 95 % bootstraps.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

SCHEMA_VERSION: Literal[1] = 1


class Part(BaseModel):
    """Base of every part: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(Part):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Interval:
        if self.low > self.high:
            raise ValueError(f"interval from {self.low} to {self.high}")
        return self


Table = dict[str, dict[str, Interval]]  # data set -> metric -> value


class StepRecord(Part):
    """One pipeline step of the run; `seconds` is what it took when it was built, also where it was skipped now."""

    name: str
    status: str
    seconds: float
    peak_pss_mb: float | None
    artifact: str | None


class Model(Part):
    """Where a model is."""

    folder: str
    registry_uri: str | None


class Difference(Part):
    """A paired difference `a - b` over the same items, bootstrapped.

    `over` is a data set, or "mean of retrieval sets". `clear` says that the interval leaves out zero.
    """

    a: str
    b: str
    over: str
    metric: str
    value: float
    low: float
    high: float
    clear: bool


class Share(Part):
    """What a student keeps of the teacher's mean primary score over the retrieval sets.

    Attributes:
        system: "student" or "student@<dim>".
        value: mean score of the system.
        of_teacher: share of the teacher's mean at full width.
        of_student: share of the student's own mean at full width.
    """

    system: str
    value: float
    of_teacher: float
    of_student: float


class Dataset(Part):
    """A data set of the run, from the manifest of `prepare`."""

    task: str
    instruction: str
    split_rule: str
    synthetic: bool
    licence: str
    train: int
    dev: int
    test: int
    documents: int
    documents_shared: int | None = None
    near_copies_dropped: int
    near_copies_left: int
    rejected: int
    evaluation_hash: str


class Input(Part):
    """An input artifact of a step."""

    uri: str
    manifest_hash: str


class LineageEntry(Part):
    """Where a step's result comes from."""

    manifest_hash: str
    fingerprint: str
    git_revision: str | None
    inputs: dict[str, Input]


class Training(Part):
    """A training step in short; `metrics.jsonl` has every optimiser step. A loss that is no number is null."""

    steps: int
    first_loss: float | None
    last_loss: float | None
    workers: int | None
    threads_per_worker: int | None
    precision: str | None  # as resolved on this machine's processor; as configured where workers have GPUs
    metrics: str


class Environment(Part):
    """What the run ran on, as far as numbers depend on it."""

    date: str
    python: str
    platform: str
    processor: str
    cpus: int
    memory_gib: float
    bf16: bool
    git_revision: str | None
    packages: dict[str, str]


class Report(Part):
    """`report.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    recipe: str
    steps: list[StepRecord]
    baselines: dict[str, Table]
    scores: dict[str, Table]
    models: dict[str, Model]
    wall_seconds: float
    peak_pss_mb: float | None

    # `notes`: how the scores were taken; `untrained_variants`: the untrained backbone's forms, compared on dev;
    # further scores: the teacher's prefixes ("teacher@<dim>"), the student before training ("student_before")
    other_scores: dict[str, Table]
    comparisons: list[Difference]
    shares: list[Share]
    notes: dict[str, str]
    untrained_variants: dict[str, Any] | None
    registrations: dict[str, dict[str, Any]]
    student: dict[str, Any] | None
    datasets: dict[str, Dataset]
    mining: dict[str, Any] | None
    training: dict[str, Training]
    lineage: dict[str, LineageEntry]
    environment: Environment
    resolved_recipe: dict[str, Any]
