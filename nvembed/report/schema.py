"""The schema of `report.json`. Keys that external checks rely on come first, further ones after them.

Scores are 0-1 (Spearman: -1 to 1); the primary metric of a data set comes first; intervals are 95 % bootstraps.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator


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
    """One pipeline step of the run."""

    name: str
    status: str
    seconds: float  # of its build, also where it was skipped now
    peak_pss_mb: float | None
    artifact: str | None


class Model(Part):
    """The location of a model."""

    folder: str
    registry_uri: str | None


class Difference(Part):
    """A paired difference `a - b` over the same items, bootstrapped."""

    a: str
    b: str
    over: str  # a data set, or "mean of retrieval sets"
    metric: str
    value: float
    low: float
    high: float
    clear: bool  # the interval does not contain zero


class Share(Part):
    """A student's mean primary score over the retrieval sets as a share of the teacher's."""

    system: str  # "student" or "student@<dim>"
    value: float
    of_teacher: float  # of the teacher's mean at full width
    of_student: float  # of the student's own mean at full width


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
    documents_shared: int
    near_copies_dropped: int
    near_copies_left: int
    rejected: int
    evaluation_hash: str


class Mixed(Part):
    """One data set in one training stream: its share in the recipe and in the stream."""

    task: str | None
    weight: float | None  # the recipe's; None where there are no weights (distillation draws texts, not data sets)
    asked: float | None  # the configured share: weight over the sum of the weights
    rows: int | None  # examples drawn, repeats included; None where only the share is known
    realised: float  # share of the stream's examples
    usable: int  # examples it could draw from
    epochs: float  # how often each of them was drawn


class Negatives(Part):
    """Quality of a data set's mined negatives by the retriever's scores, from the audit's histograms (bins of 0.05)."""

    positive: float  # mean score of the positives
    negative: float  # mean score of the selected negatives
    above_median: float  # share of selected negatives that score above the median positive
    overlap: float  # common area of both histograms: 0 for separate, 1 for equal ones


class Restart(Part):
    """Where a stopped training step was resumed."""

    step: int
    time: float  # seconds since 1970
    world_size: int | None


class Champion(Part):
    """The registry's champion before this run registered its model."""

    version: str
    scores: Table
    mean: Interval | None  # nDCG@10 over its retrieval sets; None where its per-item scores were not available
    other_sets: list[str]  # data sets whose held-out examples were not this run's (their hashes differ)


class Size(Part):
    """The cost of a model."""

    parameters: int
    bytes: int  # of its weights
    dim: int | None  # numbers per embedding
    encode_seconds: float | None  # CPU seconds per 1,000 texts, where measured


class Input(Part):
    """An input artifact of a step."""

    uri: str
    manifest_hash: str


class LineageEntry(Part):
    """The origin of a step's result."""

    manifest_hash: str
    fingerprint: str
    git_revision: str | None
    inputs: dict[str, Input]


class Training(Part):
    """Summary of a training step; `metrics.jsonl` has every optimiser step. A loss that is not finite is null.

    A gap is the mean cosine of a query to its positive minus that to its hardest negative; null for objectives without
    negatives.
    """

    steps: int
    first_loss: float | None
    last_loss: float | None
    workers: int | None
    threads_per_worker: int | None
    precision: str | None  # as resolved on this machine's processor; as configured where workers have GPUs
    metrics: str
    first_gap: float | None
    last_gap: float | None
    restarts: list[Restart]  # empty for a run without interruption


class Environment(Part):
    """Machine and versions of the run, as far as numbers depend on them."""

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

    schema_version: Literal[1] = 1
    recipe: str
    steps: list[StepRecord]
    baselines: dict[str, Table]
    scores: dict[str, Table]
    models: dict[str, Model]
    wall_seconds: float
    peak_pss_mb: float | None

    other_scores: dict[str, Table]  # the teacher's prefixes ("teacher@<dim>"), the student before ("student_before")
    comparisons: list[Difference]
    shares: list[Share]
    notes: dict[str, str]  # how the scores were measured
    untrained_variants: dict[str, Any] | None  # the untrained backbone's forms, compared on dev
    registrations: dict[str, dict[str, Any]]
    student: dict[str, Any] | None
    datasets: dict[str, Dataset]
    mining: dict[str, Any] | None
    training: dict[str, Training]
    lineage: dict[str, LineageEntry]
    environment: Environment
    resolved_recipe: dict[str, Any]
    mixes: dict[str, dict[str, Mixed]]  # by stream step, then by data set
    negatives: dict[str, Negatives]
    means: dict[str, Interval]  # nDCG@10 over the retrieval sets
    champions: dict[str, Champion]  # by role
    sizes: dict[str, Size]  # by model: teacher, student, untrained, minilm
