"""The score tables and charts of both pages: systems are rows; the metrics of a run, or several runs, are columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from nvembed.evaluation.significance import RETRIEVAL_METRIC
from nvembed.report.charts import Chart, Dot, dot_chart
from nvembed.report.runs import Run
from nvembed.report.schema import Interval, Report, Table
from nvembed.report.systems import CHAMPION, all_tables, in_reading_order, mean_retrieval, retrieval_scores
from nvembed.report.words import METRIC_NAMES, mark_kind, metric_name, short_name


class Column(NamedTuple):
    """A column of scores."""

    heading: str | tuple[str, str]  # a text, or a text with a note
    scores: Mapping[str, Interval | float]  # by system; a number where the interval is not known
    others: Collection[str] = ()  # systems with other held-out examples: not comparable
    best: float | None = None  # to be marked


class ScoreTable(NamedTuple):
    """A table of scores; a system without a score in a column gets a dash."""

    caption: str
    systems: Sequence[str]
    columns: Sequence[Column]


class DatasetScores(NamedTuple):
    """The scores on one data set."""

    name: str
    metric: str  # its primary one, which the chart shows
    table: ScoreTable
    chart: Chart


class Scores(NamedTuple):
    """The scores of a page: a summary over the data sets, and each data set."""

    summary: ScoreTable
    datasets: Sequence[DatasetScores]


def run_scores(report: Report) -> Scores | None:
    """The scores of a run, and of champions on the data sets that it was scored on too; None where there are none."""
    tables = all_tables(report)
    known = {dataset for table in tables.values() for dataset in table}
    for role, champion in report.champions.items():
        tables[CHAMPION + role] = {name: scores for name, scores in champion.scores.items() if name in known}
    systems = in_reading_order(tables)
    datasets = [_of_run(report, systems, name) for name in _dataset_names(systems)]
    datasets.sort(key=lambda dataset: [*METRIC_NAMES, dataset.metric].index(dataset.metric))
    columns = []
    if retrieval := [dataset.table.columns[0] for dataset in datasets if dataset.metric == RETRIEVAL_METRIC]:
        columns.append(_marked(("mean", "retrieval sets"), _means(report, systems, retrieval)))
    for name, metric, table, _ in datasets:
        synthetic = name in report.datasets and report.datasets[name].synthetic
        note = metric_name(metric) + (", synthetic" if synthetic else "")
        columns.append(table.columns[0]._replace(heading=(name, note)))
    summary = ScoreTable("Primary metric of every data set", list(systems), columns)
    return Scores(summary, datasets) if datasets else None


def _of_run(report: Report, systems: Mapping[str, Table], dataset: str) -> DatasetScores:
    """All metrics as columns, the primary one first."""
    rows = {system: table[dataset] for system, table in systems.items() if table.get(dataset)}
    others = {CHAMPION + role for role, champion in report.champions.items() if dataset in champion.other_sets}
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    columns = [
        _marked(metric_name(metric), {system: row[metric] for system, row in rows.items() if metric in row}, others)
        for metric in metrics
    ]
    dots = [
        score_dot(short_name(system), system, row[metrics[0]])
        for system, row in rows.items()
        if metrics[0] in row and system not in others
    ]
    table = ScoreTable(f"{dataset}: all metrics", list(rows), columns)
    return DatasetScores(dataset, metrics[0], table, _chart(dataset, metrics[0], dots))


def _means(report: Report, systems: Mapping[str, Table], retrieval: Sequence[Column]) -> dict[str, Interval | float]:
    """Means of the systems that have a comparable score on every retrieval set."""
    means: dict[str, Interval | float] = {}
    for name, table in systems.items():
        champion = report.champions.get(name.removeprefix(CHAMPION)) if name.startswith(CHAMPION) else None
        mean = report.means.get(name) if champion is None else champion.mean
        if champion is not None and len(retrieval_scores(champion.scores)) != len(retrieval):
            mean = None  # over more sets than this run's, it would be another number
        value = mean or mean_retrieval(table)
        if value is not None and all(name in column.scores and name not in column.others for column in retrieval):
            means[name] = value
    return means


def _marked(
    heading: str | tuple[str, str], scores: Mapping[str, Interval | float], others: Collection[str] = ()
) -> Column:
    """A column with its best value."""
    comparable = [score for system, score in scores.items() if system not in others]
    numbers = [score.value if isinstance(score, Interval) else score for score in comparable]
    return Column(heading, scores, others, max(numbers, default=None))


def compared_scores(runs: Sequence[Run]) -> Scores | None:
    """The primary metrics of several runs, and the trained models as charts; None where nothing was scored."""
    tables = [all_tables(run.report) for run in runs]
    systems = list(dict.fromkeys(system for by_system in tables for system in by_system))
    names = dict.fromkeys(name for by_system in tables for name in _dataset_names(by_system))
    datasets = []
    for name in names:
        rows = [{system: table[name] for system, table in by_system.items() if table.get(name)} for by_system in tables]
        metric = next(iter(next(scores for row in rows for scores in row.values())))
        columns = [
            Column(run.title, {system: scores[metric] for system, scores in row.items() if metric in scores})
            for run, row in zip(runs, rows, strict=True)
        ]
        scored = [system for system in systems if any(system in column.scores for column in columns)]
        dots = [
            score_dot(f"{run.label} {short_name(system)}", system, row[system][metric])
            for system in scored
            if mark_kind(system) != "baseline"
            for run, row in zip(runs, rows, strict=True)
            if metric in row.get(system, {})
        ]
        table = ScoreTable(f"{name}: {metric_name(metric)}", scored, columns)
        datasets.append(DatasetScores(name, metric, table, _chart(name, metric, dots)))
    means = [Column(run.title, run.report.means) for run in runs]
    return Scores(ScoreTable("Mean nDCG@10 of the retrieval sets", systems, means), datasets) if datasets else None


def score_dot(label: str, system: str, score: Interval, cost: float = 0.0) -> Dot:
    """A score in a chart."""
    return Dot(label, mark_kind(system), score.value, score.low, score.high, cost)


def _chart(dataset: str, metric: str, dots: Sequence[Dot]) -> Chart:
    return dot_chart(f"{dataset}: {metric_name(metric)}", f"{metric_name(metric)}, 95 % interval", dots)


def _dataset_names(systems: Mapping[str, Table]) -> list[str]:
    """Data sets with a score, each once."""
    return list(dict.fromkeys(name for table in systems.values() for name, scores in table.items() if scores))
