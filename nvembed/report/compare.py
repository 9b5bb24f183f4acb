"""Compares runs: differences of their recipes, and paired differences of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nvembed.core.steps import differences as recipe_differences
from nvembed.evaluation.significance import MEAN, RETRIEVAL_METRIC
from nvembed.report.runs import Run
from nvembed.report.schema import Difference, Interval, Model, Part, Report, Table
from nvembed.report.systems import BASELINES, ScoredSystem, all_tables, paired_differences, scored_systems
from nvembed.types import UserError


class RunEntry(Part):
    """One of the runs."""

    label: str
    recipe: str
    source: str
    date: str
    wall_seconds: float
    peak_pss_mb: float | None
    git_revision: str | None
    models: dict[str, Model]
    scores: dict[str, Table]
    means: dict[str, Interval]


class RunPair(Part):
    """The first run and a later one.

    Attributes:
        recipe: `path: the first's value -> the later's` for every setting in which they differ.
        differences: paired, the later run minus the first; `a` and `b` of a difference are "<label> <system>".
        other_sets: data sets of both whose held-out examples differ (evaluation hashes); they are not compared.
        left_out: systems and data sets that could not be compared, with the reason.
    """

    first: str
    later: str
    recipe: list[str]
    differences: list[Difference]
    other_sets: list[str]
    left_out: list[str]


class RunComparison(Part):
    """The comparison as JSON."""

    schema_version: Literal[1] = 1
    runs: list[RunEntry]
    pairs: list[RunPair]


def compare_runs(runs: Sequence[Run]) -> RunComparison:
    """Compare every later run with the first."""
    entries = [
        RunEntry(
            label=run.label,
            recipe=run.report.recipe,
            source=run.source,
            date=run.report.environment.date,
            wall_seconds=run.report.wall_seconds,
            peak_pss_mb=run.report.peak_pss_mb,
            git_revision=run.report.environment.git_revision,
            models=run.report.models,
            scores=all_tables(run.report),
            means=run.report.means,
        )
        for run in runs
    ]
    return RunComparison(runs=entries, pairs=[_pair(runs[0], later) for later in runs[1:]])


def other_sets(one: Report, other: Report) -> list[str]:
    """Data sets of both runs whose held-out examples are not the same."""
    return [
        name
        for name, dataset in one.datasets.items()
        if name in other.datasets and dataset.evaluation_hash != other.datasets[name].evaluation_hash
    ]


def _pair(first: Run, later: Run) -> RunPair:
    differences, left_out = _differences(first, later)
    return RunPair(
        first=first.label,
        later=later.label,
        recipe=recipe_differences(_named(first.report.resolved_recipe), _named(later.report.resolved_recipe)),
        differences=differences,
        other_sets=other_sets(first.report, later.report),
        left_out=left_out,
    )


def _named(value: Any) -> Any:
    """Lists of entries with names as mappings by name, so that a change in one entry is one line."""
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
        names = [str(item["name"]) for item in value]
        if len(set(names)) == len(names):
            return {name: _named(item) for name, item in zip(names, value, strict=True)}
    return value


def _differences(first: Run, later: Run) -> tuple[list[Difference], list[str]]:
    """Paired differences of the trained systems of both runs, and what could not be compared."""
    differing = other_sets(first.report, later.report)
    differences: list[Difference] = []
    left_out = [f"{name}: its held-out examples differ (evaluation hashes)" for name in differing]
    ours, theirs = scored_systems(first.artifacts), scored_systems(later.artifacts)
    for system in _trained(first.report):
        if system not in all_tables(later.report):
            left_out.append(f"{system}: run {later.label} has no such model")
        elif system not in ours or system not in theirs:
            gone = first.label if system not in ours else later.label
            left_out.append(f"{system}: the per-item scores of run {gone} no longer exist")
        else:
            try:
                differences += _paired(first, later, system, (ours[system], theirs[system]), differing)
            except (UserError, OSError) as error:
                left_out.append(f"{system}: {error}")
    return differences, left_out


def _trained(report: Report) -> list[str]:
    return [name for name in all_tables(report) if name not in BASELINES and name.partition("@")[0] != "student_before"]


def _paired(
    first: Run, later: Run, system: str, scored: tuple[ScoredSystem, ScoredSystem], differing: Sequence[str]
) -> list[Difference]:
    tables = [all_tables(run.report)[system] for run in (first, later)]
    shared = [name for name in tables[0] if name in tables[1] and name not in differing]
    if not shared:
        return []
    names = (f"{later.label} {system}", f"{first.label} {system}")
    settings = first.report.resolved_recipe.get("evaluate") or {}
    rows = paired_differences(names, (scored[1], scored[0]), settings, shared)
    whole = not any(RETRIEVAL_METRIC in tables[0].get(name, {}) for name in differing)  # else the mean is of fewer sets
    return [row for row in rows if whole or row.over != MEAN]
