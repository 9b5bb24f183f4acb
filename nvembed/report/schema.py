"""The schema of `report.json`. Keys that external checks rely on come first, further ones after them.

Scores are 0-1 (Spearman: -1 to 1); the primary metric of a data set comes first; intervals are 95 % bootstraps.
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
    """One pipeline step of the run; `seconds` is the time of its build, also where it was skipped now."""

    name: str
    status: str
    seconds: float
    peak_pss_mb: float | None
    artifact: str | None


class Model(Part):
    """The location of a model."""

    folder: str
    registry_uri: str | None


class Difference(Part):
    """A paired difference `a - b` over the same items, bootstrapped.

    `over` is a data set, or "mean of retrieval sets". `clear`: the interval does not contain zero.
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
    """A student's mean primary score over the retrieval sets as a share of the teacher's.

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


class Mixed(Part):
    """One data set in one training stream: its share in the recipe and in the stream.

    Attributes:
        weight: the recipe's; None where there are no weights (distillation draws texts, not data sets).
        asked: the share that the recipe asks for: weight over the sum of the weights.
        rows: examples drawn, repeats included; None where only the share is known.
        realised: share of the stream's examples.
        usable: examples it could draw from.
        epochs: how often each of them was drawn.
    """

    task: str | None
    weight: float | None
    asked: float | None
    rows: int | None
    realised: float
    usable: int
    epochs: float


class Negatives(Part):
    """Quality of a data set's mined negatives by the retriever's scores, from the audit's histograms (bins of 0.05).

    Attributes:
        positive: mean score of the positives.
        negative: mean score of the selected negatives.
        above_median: share of selected negatives that score above the median positive.
        overlap: common area of both histograms: 0 for separate, 1 for equal ones.
    """

    positive: float
    negative: float
    above_median: float
    overlap: float


class Restart(Part):
    """Where a stopped training step was resumed; `time` in seconds since 1970."""

    step: int
    time: float
    world_size: int | None


class Champion(Part):
    """The registry's champion before this run registered its model.

    Attributes:
        mean: nDCG@10 over its retrieval sets; None where its per-item scores were not available.
        other_sets: data sets whose held-out examples were not this run's (their hashes differ).
    """

    version: str
    scores: Table
    mean: Interval | None = None
    other_sets: list[str]


class Size(Part):
    """The cost of a model: parameters, bytes of its weights, width, CPU seconds per 1,000 texts where measured."""

    parameters: int
    bytes: int
    dim: int | None
    encode_seconds: float | None


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

    Attributes:
        first_gap: mean cosine of a query to its positive minus that to its hardest negative, at the first step; null
            for objectives without negatives.
        restarts: where it was resumed; empty for a run without interruption.
    """

    steps: int
    first_loss: float | None
    last_loss: float | None
    workers: int | None
    threads_per_worker: int | None
    precision: str | None  # as resolved on this machine's processor; as configured where workers have GPUs
    metrics: str
    first_gap: float | None = None
    last_gap: float | None = None
    restarts: list[Restart] = []


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

    schema_version: Literal[1] = SCHEMA_VERSION
    recipe: str
    steps: list[StepRecord]
    baselines: dict[str, Table]
    scores: dict[str, Table]
    models: dict[str, Model]
    wall_seconds: float
    peak_pss_mb: float | None

    # `notes`: how the scores were measured; `untrained_variants`: the untrained backbone's forms, compared on dev;
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

    # added later, hence with defaults: an older report.json can be read
    # `mixes`: by stream step, then by data set; `means`: nDCG@10 over the retrieval sets; `champions`: by role;
    # `sizes`: by model: teacher, student, untrained, minilm
    mixes: dict[str, dict[str, Mixed]] = {}
    negatives: dict[str, Negatives] = {}
    means: dict[str, Interval] = {}
    champions: dict[str, Champion] = {}
    sizes: dict[str, Size] = {}
