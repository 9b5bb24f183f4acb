"""What each section of the comparison page shows; `templates/comparison.html` shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nvembed.evaluation.significance import MEAN
from nvembed.report.charts import Chart, Dot, curves_chart, dot_chart, point_chart
from nvembed.report.collect import gap
from nvembed.report.compare import RunComparison
from nvembed.report.run_page import Card, Curves, by_pair, environment_facts, measured_systems, size_dot
from nvembed.report.runs import Run
from nvembed.report.schema import Interval, Table
from nvembed.report.systems import all_tables, mean_retrieval
from nvembed.report.words import mark_kind, metric_name, short_name, signed, system_name


def comparison_sections(runs: Sequence[Run], comparison: RunComparison, curves: Mapping[str, Curves]) -> dict[str, Any]:
    """Title of a section -> what it shows, as described in the template; a section with an empty value is left out."""
    differences = [(pair, by_pair(pair.differences)) for pair in comparison.pairs]
    losses = list(_overlaid(curves, "loss", lambda row: float(row["loss"])))
    gaps = list(_overlaid(curves, "gap", gap))
    mixes = _by_name([run.report.mixes for run in runs])
    return {
        "In short": list(_headline(comparison)),
        "What differs in the recipes": comparison.pairs,
        "Scores": _scores(runs, comparison),
        "Differences": differences if any(rows or pair.left_out for pair, rows in differences) else None,
        "Size and quality": _sizes(runs),
        "Training": {"charts": losses + gaps, "gaps": bool(gaps)} if losses or gaps else None,
        "Data mix": {step: _by_name([mix or {} for mix in columns]) for step, columns in mixes.items()},
        "Time and memory": _by_name([{step.name: step for step in run.report.steps} for run in runs]),
        "Models": [run for run in runs if run.report.models],
        "Environment": {"facts": _differing_facts(runs)},
    }


def _by_name(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows of a table from its columns; None where a column lacks the row."""
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def _headline(comparison: RunComparison) -> Iterator[Card]:
    """The mean difference of teacher and student, for each pair."""
    for pair in comparison.pairs:
        for system in ("teacher", "student"):
            for row in pair.differences:
                if row.over == MEAN and row.a == f"{pair.later} {system}":
                    note = f"mean nDCG@10, 95 % interval {signed(row.low)} to {signed(row.high)}"
                    title = f"{system_name(system)}, {pair.later} − {pair.first}"
                    yield Card(title, signed(row.value), note + ("" if row.clear else ": not clear"))


# -- scores -----------------------------------------------------------------------------------------------------------


def _scores(runs: Sequence[Run], comparison: RunComparison) -> dict[str, Any] | None:
    tables = {run.label: all_tables(run.report) for run in runs}
    all_scores = [table for systems in tables.values() for table in systems.values()]
    names = dict.fromkeys(name for table in all_scores for name, metrics in table.items() if metrics)
    if not names:
        return None
    differing = {name for pair in comparison.pairs for name in pair.other_sets}
    means = [{name: _mean(run, name, table) for name, table in tables[run.label].items()} for run in runs]
    datasets = [{**_dataset(name, tables), "differs": name in differing} for name in names]
    return {"means": _by_name(means), "datasets": datasets, "differing": sorted(differing)}


def _mean(run: Run, system: str, table: Table) -> Interval | float | None:
    """With its interval where the report has one; earlier versions wrote none."""
    return run.report.means.get(system) or mean_retrieval(table)


def _dataset(dataset: str, tables: Mapping[str, Mapping[str, Table]]) -> dict[str, Any]:
    """A data set's primary metric: a row for each system, a column for each run, and the trained models as a chart."""
    scores = next(table[dataset] for systems in tables.values() for table in systems.values() if table.get(dataset))
    metric = next(iter(scores))
    columns = [
        {name: table.get(dataset, {}).get(metric) for name, table in systems.items()} for systems in tables.values()
    ]
    rows = {name: values for name, values in _by_name(columns).items() if any(values)}
    dots = [
        Dot(f"{label} {short_name(name)}", mark_kind(name), value.value, value.low, value.high)
        for name, values in rows.items()
        if mark_kind(name) != "baseline"
        for label, value in zip(tables, values, strict=True)
        if value is not None
    ]
    caption = f"{dataset}: {metric_name(metric)}"
    chart = dot_chart(caption, f"{metric_name(metric)}, 95 % interval", dots)
    return {"name": dataset, "caption": caption, "chart": chart, "rows": rows}


# -- size, training, environment --------------------------------------------------------------------------------------


def _sizes(runs: Sequence[Run]) -> Chart | None:
    dots = [
        size_dot(f"{run.label} {short_name(name)}", name, size, mean)
        for run in runs
        for name, (size, mean) in measured_systems(run.report).items()
        if mark_kind(name) != "baseline" and "@" not in name
    ]
    return point_chart("Quality by size", "million parameters", "mean nDCG@10", dots) if dots else None


def _overlaid(curves: Mapping[str, Curves], what: str, value: Callable[..., float | None]) -> Iterator[Chart]:
    """A chart for each training step, the runs over each other."""
    for step in dict.fromkeys(step for steps in curves.values() for step in steps):
        lines = {
            label: [(float(row["step"]), number) for row in steps.get(step, ()) if (number := value(row)) is not None]
            for label, steps in curves.items()
        }
        if any(lines.values()):
            yield curves_chart(f"{step}: {what}", "optimiser step", what, lines)


def _differing_facts(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    facts = _by_name([environment_facts(run.report.environment) for run in runs])
    return {what: values for what, values in facts.items() if len(set(values)) > 1}
