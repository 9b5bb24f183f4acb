"""Compares runs: differences of their recipes, and paired differences of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nvembed.core.steps import differences as recipe_differences
from nvembed.evaluation.significance import MEAN, RETRIEVAL_METRIC
from nvembed.report.runs import Run
from nvembed.report.schema import Difference, Interval, Model, Part, Table
from nvembed.report.systems import BASELINES, all_tables, paired_differences, scored_systems
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
    """The first run and a later one."""

    first: str
    later: str
    recipe: list[str]  # `path: the first's value -> the later's` for every setting in which they differ
    differences: list[Difference]  # paired, the later minus the first; `a` and `b` are "<label> <system>"
    other_sets: list[str]  # data sets of both whose held-out examples differ (evaluation hashes); not compared
    left_out: list[str]  # systems and data sets that could not be compared, with the reason


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


def _pair(first: Run, later: Run) -> RunPair:
    """Paired differences of the trained systems of both runs, and what could not be compared."""
    tables, later_tables = all_tables(first.report), all_tables(later.report)
    scored, later_scored = scored_systems(first.artifacts), scored_systems(later.artifacts)
    hashes = [{name: data.evaluation_hash for name, data in run.report.datasets.items()} for run in (first, later)]
    differing = [name for name, ours in hashes[0].items() if hashes[1].get(name, ours) != ours]
    left_out = [f"{name}: its held-out examples differ (evaluation hashes)" for name in differing]
    differences: list[Difference] = []
    for system in tables:
        if system in BASELINES or system.partition("@")[0] == "student_before":
            continue
        if system not in later_tables:
            left_out.append(f"{system}: run {later.label} has no such model")
        elif system not in scored or system not in later_scored:
            gone = first.label if system not in scored else later.label
            left_out.append(f"{system}: the per-item scores of run {gone} no longer exist")
        elif shared := [name for name in tables[system] if name in later_tables[system] and name not in differing]:
            names = (f"{later.label} {system}", f"{first.label} {system}")
            settings = first.report.resolved_recipe.get("evaluate") or {}
            # where a retrieval set differs, the mean would be of fewer sets
            partial = any(RETRIEVAL_METRIC in tables[system].get(name, {}) for name in differing)
            try:
                rows = paired_differences(names, (later_scored[system], scored[system]), settings, shared)
                differences += [row for row in rows if not partial or row.over != MEAN]
            except (UserError, OSError) as error:
                left_out.append(f"{system}: {error}")
    return RunPair(
        first=first.label,
        later=later.label,
        recipe=recipe_differences(_named(first.report.resolved_recipe), _named(later.report.resolved_recipe)),
        differences=differences,
        other_sets=differing,
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
