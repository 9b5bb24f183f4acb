"""The parts of a page that are more than values: tables of scores, charts, chains of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nvembed.report.charts import Chart, bar_chart, curves_chart, line_chart, point_chart
from nvembed.report.collect import gap
from nvembed.report.compare import RunComparison
from nvembed.report.runs import Run
from nvembed.report.schema import Difference, Environment, Interval, Report, Size
from nvembed.report.scores import compared_scores, run_scores, score_dot
from nvembed.report.systems import all_tables
from nvembed.report.words import mark_kind, short_name

Curves = Mapping[str, Sequence[Mapping[str, Any]]]  # rows of `metrics.jsonl` by training step
Value = Callable[[Mapping[str, Any]], float | None]  # of such a row


def run_content(report: Report, curves: Curves) -> dict[str, Any]:
    """The variables of `templates/report.html`, which describes them."""
    audits = report.mining["datasets"] if report.mining is not None else {}
    makers = {role: model.folder.rstrip("/").rsplit("/", 2)[-2] for role, model in report.models.items()}
    return {
        "report": report,
        "scores": run_scores(report),
        "sizes": _sizes(report),
        "curves": list(_curves(report, curves)),
        "audits": audits,
        "histograms": list(_histograms(audits)),
        "ranks": sorted({bucket for audit in audits.values() for bucket in audit["positive_ranks"]}, key=_rank_order),
        "owners": _owners(report),
        "chains": {role: ancestors(report, step) for role, step in makers.items() if step in report.lineage},
        "environment": _environment_facts(report.environment),
    }


def comparison_content(runs: Sequence[Run], comparison: RunComparison, curves: Mapping[str, Curves]) -> dict[str, Any]:
    """The variables of `templates/comparison.html`, which describes them."""
    mixes = _by_name([run.report.mixes for run in runs])
    measured = [entry for run in runs for entry in _measured(run.report, f"{run.label} ")]
    models = [entry for entry in measured if mark_kind(entry.system) != "baseline" and "@" not in entry.system]
    facts = _by_name([_environment_facts(run.report.environment) for run in runs])
    return {
        "runs": runs,
        "pairs": comparison.pairs,
        "scores": compared_scores(runs),
        "sizes": _size_chart(models) if models else None,
        "losses": list(_overlaid(curves, "loss", _loss)),
        "gaps": list(_overlaid(curves, "gap", gap)),
        "mixes": {step: _by_name([mix or {} for mix in columns]) for step, columns in mixes.items()},
        "steps": _by_name([{step.name: step for step in run.report.steps} for run in runs]),
        "environment": {what: values for what, values in facts.items() if len(set(values)) > 1},
    }


def _by_name(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows of a table from its columns; None where a column lacks the row."""
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def by_pair(differences: Iterable[Difference]) -> dict[tuple[str, str], list[Difference]]:
    """Differences by the two systems compared."""
    pairs: dict[tuple[str, str], list[Difference]] = {}
    for row in differences:
        pairs.setdefault((row.a, row.b), []).append(row)
    return pairs


def _environment_facts(environment: Environment) -> dict[str, str]:
    """Machine and versions in words."""
    return {
        "processor": f"{environment.processor}, {environment.cpus} CPUs, bf16 {'yes' if environment.bf16 else 'no'}",
        "memory": f"{environment.memory_gib} GiB",
        "system": f"{environment.platform}, Python {environment.python}",
        **environment.packages,
    }


# -- size and quality -------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """A system whose size and mean nDCG@10 are known."""

    label: str  # its name in charts
    system: str
    size: Size
    mean: Interval


def _measured(report: Report, before: str = "") -> list[Measured]:
    """A prefix has its model's size; BM25 has no parameters. `before` stands before the labels."""
    sizes = {name: report.sizes.get(name.partition("@")[0]) for name in all_tables(report) if name in report.means}
    return [
        Measured(before + short_name(name), name, size, report.means[name])
        for name, size in sizes.items()
        if size is not None
    ]


def _sizes(report: Report) -> dict[str, Any] | None:
    measured = _measured(report)
    costs = [
        score_dot(entry.label, entry.system, entry.mean, entry.size.encode_seconds)
        for entry in measured
        if entry.size.encode_seconds is not None
    ]
    charts = [_size_chart(measured)]
    if costs:
        charts.append(point_chart("Quality by encode cost", "CPU seconds per 1,000 texts", "mean nDCG@10", costs))
    return {"charts": charts, "rows": measured} if len(measured) > 1 else None


def _size_chart(measured: Iterable[Measured]) -> Chart:
    dots = [score_dot(label, system, mean, size.parameters / 1e6) for label, system, size, mean in measured]
    return point_chart("Quality by size", "million parameters", "mean nDCG@10", dots)


# -- training and its data --------------------------------------------------------------------------------------------


def _curves(report: Report, curves: Curves) -> Iterator[Chart]:
    for step, rows in curves.items():
        restarts = [float(restart.step) for restart in report.training[step].restarts]
        for what, value in (("loss", _loss), ("gap", gap)):
            if points := _points(rows, value):
                yield line_chart(f"{step}: {what}", "optimiser step", what, points, restarts)


def _overlaid(curves: Mapping[str, Curves], what: str, value: Value) -> Iterator[Chart]:
    """A chart for each training step, the runs over each other."""
    for step in dict.fromkeys(step for steps in curves.values() for step in steps):
        lines = {label: _points(steps.get(step, ()), value) for label, steps in curves.items()}
        if any(lines.values()):
            yield curves_chart(f"{step}: {what}", "optimiser step", what, lines)


def _points(rows: Iterable[Mapping[str, Any]], value: Value) -> list[tuple[float, float]]:
    """A value of every optimiser step that has it."""
    return [(float(row["step"]), number) for row in rows if (number := value(row)) is not None]


def _loss(row: Mapping[str, Any]) -> float:
    return float(row["loss"])


def _histograms(audits: Mapping[str, Mapping[str, Any]]) -> Iterator[Chart]:
    for name, audit in audits.items():
        edges = audit["score_histograms"]["edges"]
        series = {kind: audit["score_histograms"][kind] for kind in ("positives", "negatives", "rejected")}
        if any(any(counts) for counts in series.values()):
            yield bar_chart(f"{name}: scores", "similarity to the query", edges, series)


def _rank_order(bucket: str) -> tuple[bool, int]:
    return bucket.startswith(">"), int(bucket.strip(">").split("-")[0])


# -- where the results come from --------------------------------------------------------------------------------------


def _owners(report: Report) -> dict[str, str]:
    """The step that made each result, by the hash of its manifest."""
    return {entry.manifest_hash: name for name, entry in report.lineage.items()}


def ancestors(report: Report, step: str) -> list[str]:
    """The steps a result depends on, directly or not, and the step itself, in the order of the run."""
    owners, steps, waiting = _owners(report), {step}, [step]
    while waiting:
        for source in report.lineage[waiting.pop()].inputs.values():
            owner = owners.get(source.manifest_hash)
            if owner is not None and owner not in steps:
                steps.add(owner)
                waiting.append(owner)
    return [name for name in report.lineage if name in steps]
