"""The systems of a run (baselines, teacher, student, prefixes): where their scores are, and paired differences.

The bootstrap itself is in `nvembed.evaluation.significance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nvembed.core import storage
from nvembed.evaluation.significance import RETRIEVAL_METRIC, compare, retrieval_mean
from nvembed.report.schema import Difference, Interval, Report, Share, Table
from nvembed.types import Artifact

BASELINES = ("bm25", "minilm", "untrained")
OPPONENTS = ("untrained", "bm25", "minilm")  # of the teacher
CHAMPION = "champion_"  # before a role's name: the registry's champion before this run
READING_ORDER = (*BASELINES, CHAMPION + "teacher", "teacher", "student_before", CHAMPION + "student", "student")
# step that scored, and the report's name for its system "model"
SCORED = {"evaluate_teacher": "teacher", "evaluate_student_init": "student_before", "evaluate_student": "student"}


class ScoredSystem(NamedTuple):
    """Where the scores of a system are: the artifact, the system's name in its files, and its `scores.json`."""

    artifact: Artifact
    name: str
    file: dict[str, Any]


def scored_systems(artifacts: Mapping[str, Artifact]) -> dict[str, ScoredSystem]:
    """The systems with scores among the artifacts of a run, by name in the report."""
    systems = {}
    for step in ("baselines", *SCORED):
        if step in artifacts:
            role, file = SCORED.get(step), storage.read_json(artifacts[step].path("scores.json"))
            for name in file["scores"]:
                label = name if role is None else role + name.removeprefix("model")
                systems[label] = ScoredSystem(artifacts[step], name, file)
    return systems


def all_tables(report: Report) -> dict[str, Table]:
    """Scores of every system of a run, in reading order."""
    return in_reading_order({**report.baselines, **report.scores, **report.other_scores})


def in_reading_order(tables: Mapping[str, Table]) -> dict[str, Table]:
    """Baselines, champions, teacher, student before, student, each at full width first."""
    order = [name for role in READING_ORDER for name in tables if name.partition("@")[0] == role]
    return {name: tables[name] for name in dict.fromkeys([*order, *tables])}


def retrieval_scores(table: Table) -> list[float]:
    """Primary scores of a system on its retrieval sets."""
    return [metrics[RETRIEVAL_METRIC].value for metrics in table.values() if RETRIEVAL_METRIC in metrics]


def mean_retrieval(table: Table) -> float | None:
    """Mean primary score over the retrieval sets of a system; None where it has none."""
    values = retrieval_scores(table)
    return sum(values) / len(values) if values else None


def _bootstrap(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The draws of an evaluation section of the recipe."""
    return {"samples": settings.get("bootstrap_samples", 1000), "seed": settings.get("seed", 0)}


def retrieval_means(systems: Mapping[str, ScoredSystem], settings: Mapping[str, Any]) -> dict[str, Interval]:
    """Mean nDCG@10 over the retrieval sets of every system that has some, with its interval."""
    draws = _bootstrap(settings)
    means = {name: retrieval_mean(system.artifact, system.name, **draws) for name, system in systems.items()}
    return {name: Interval(**mean) for name, mean in means.items() if mean is not None}


def teacher_shares(tables: Mapping[str, Table]) -> list[Share]:
    """The student and its prefixes as shares of the teacher; empty unless both have retrieval scores."""
    teacher, full = mean_retrieval(tables.get("teacher", {})), mean_retrieval(tables.get("student", {}))
    if not teacher or not full:
        return []
    means = {name: mean_retrieval(table) for name, table in tables.items() if name.partition("@")[0] == "student"}
    return [
        Share(system=name, value=value, of_teacher=value / teacher, of_student=value / full)
        for name, value in means.items()
        if value is not None
    ]


def compare_systems(systems: Mapping[str, ScoredSystem], settings: Mapping[str, Any]) -> list[Difference]:
    """Teacher against the baselines and the student after against before, per data set and over the retrieval sets.

    Args:
        systems: by name in the report.
        settings: the recipe's evaluation section, for `bootstrap_samples` and `seed`.
    """
    students = [name for name in systems if name.partition("@")[0] == "student"]
    pairs = [("teacher", other) for other in OPPONENTS]
    pairs += [(name, name.replace("student", "student_before", 1)) for name in students]
    return [
        difference
        for a, b in pairs
        if a in systems and b in systems
        for difference in paired_differences((a, b), (systems[a], systems[b]), settings)
    ]


def paired_differences(
    names: tuple[str, str],
    systems: tuple[ScoredSystem, ScoredSystem],
    settings: Mapping[str, Any],
    datasets: Sequence[str] | None = None,
) -> list[Difference]:
    """The first system minus the second over the same items, per data set and over the retrieval sets.

    Args:
        names: what the differences call the two systems.
        settings: an evaluation section, for `bootstrap_samples` and `seed`.
        datasets: the data sets to compare; by default all that both have.

    Raises:
        UserError: the items are not the same, or the files lack them.
    """
    a, b = systems
    rows = compare(
        a.artifact,
        b.artifact,
        " - ".join(names),
        a_system=a.name,
        b_system=b.name,
        datasets=datasets,
        **_bootstrap(settings),
    )
    return [
        Difference(
            a=names[0],
            b=names[1],
            over=row["dataset"],
            metric=row["metric"],
            clear=row["delta"]["low"] > 0 or row["delta"]["high"] < 0,
            **row["delta"],
        )
        for row in rows
    ]
