"""The score tables of `report.html`: the primary metric of every data set, and all metrics of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from nvembed.evaluation.significance import RETRIEVAL_METRIC
from nvembed.report.charts import Chart, Dot, dot_chart
from nvembed.report.schema import Interval, Report, Table
from nvembed.report.systems import CHAMPION, all_tables, in_reading_order, mean_retrieval, retrieval_scores
from nvembed.report.words import METRIC_NAMES, mark_kind, metric_name, short_name


@dataclass(frozen=True)
class Cell:
    """A score in a table.

    Attributes:
        interval: None where an older report or registration has only the value.
        best: whether it is the highest comparable value of its column.
        comparable: whether it was measured on this run's held-out examples; only a champion's may not have been.
    """

    value: float
    interval: Interval | None
    best: bool
    comparable: bool


@dataclass(frozen=True)
class DatasetScores:
    """The scores on one data set: metrics are columns (primary first), systems are rows; `heading`: name, metric."""

    name: str
    heading: tuple[str, str]
    synthetic: bool
    metrics: list[str]
    rows: dict[str, list[Cell | None]]
    chart: Chart


@dataclass(frozen=True)
class ScoreTables:
    """All data sets, and the mean over the retrieval sets by system; `means` is None without retrieval sets."""

    systems: list[str]
    datasets: list[DatasetScores]
    means: dict[str, Cell | None] | None


def score_tables(report: Report) -> ScoreTables | None:
    """The score tables of a run; None where nothing was scored."""
    systems = _systems(report)
    names = dict.fromkeys(name for table in systems.values() for name, metrics in table.items() if metrics)
    datasets = [_dataset_scores(report, systems, name) for name in names]
    datasets.sort(key=lambda dataset: [*METRIC_NAMES, dataset.metrics[0]].index(dataset.metrics[0]))
    retrieval = [dataset for dataset in datasets if dataset.metrics[0] == RETRIEVAL_METRIC]
    if not datasets:
        return None
    return ScoreTables(list(systems), datasets, _means(report, systems, retrieval) if retrieval else None)


def _systems(report: Report) -> dict[str, Table]:
    """The systems of a report, and the champions on the data sets that this run was scored on too."""
    tables = all_tables(report)
    known = {dataset for scores in tables.values() for dataset in scores}
    champions = {
        CHAMPION + role: {dataset: metrics for dataset, metrics in champion.scores.items() if dataset in known}
        for role, champion in report.champions.items()
    }
    return in_reading_order(tables | champions)


def _dataset_scores(report: Report, systems: Mapping[str, Table], dataset: str) -> DatasetScores:
    tables = {name: scores[dataset] for name, scores in systems.items() if scores.get(dataset)}
    metrics = list(dict.fromkeys(metric for values in tables.values() for metric in values))
    others = {CHAMPION + role for role, champion in report.champions.items() if dataset in champion.other_sets}
    columns = [_column({name: values.get(metric) for name, values in tables.items()}, others) for metric in metrics]
    first = metric_name(metrics[0])
    dots = [
        Dot(short_name(name), mark_kind(name), score.value, score.low, score.high)
        for name, values in tables.items()
        if name not in others and (score := values.get(metrics[0])) is not None
    ]
    chart = dot_chart(f"{dataset}: {first}", f"{first}, 95 % interval", dots)
    synthetic = dataset in report.datasets and report.datasets[dataset].synthetic
    return DatasetScores(
        name=dataset,
        heading=(dataset, first + (", synthetic" if synthetic else "")),
        synthetic=synthetic,
        metrics=metrics,
        rows={name: [column[name] for column in columns] for name in tables},
        chart=chart,
    )


def _means(report: Report, systems: Mapping[str, Table], datasets: list[DatasetScores]) -> dict[str, Cell | None]:
    """Means of the systems that have a comparable score on every retrieval set."""
    intervals = dict(report.means)
    for role, champion in report.champions.items():  # over more sets than this run's, a mean would be another number
        if champion.mean is not None and len(retrieval_scores(champion.scores)) == len(datasets):
            intervals[CHAMPION + role] = champion.mean
    rows = {name: [dataset.rows.get(name, [None])[0] for dataset in datasets] for name in systems}
    complete = [name for name, cells in rows.items() if all(cell is not None and cell.comparable for cell in cells)]
    return dict.fromkeys(systems) | _column(
        {name: intervals.get(name, mean_retrieval(systems[name])) for name in complete}
    )


def _column(values: Mapping[str, Interval | float | None], others: Collection[str] = ()) -> dict[str, Cell | None]:
    """Cells by system; `others` are systems with other held-out examples."""
    intervals = {name: value for name, value in values.items() if isinstance(value, Interval)}
    numbers = {name: value.value if isinstance(value, Interval) else value for name, value in values.items()}
    best = max((number for name, number in numbers.items() if number is not None and name not in others), default=None)
    return {
        name: None
        if number is None
        else Cell(number, intervals.get(name), name not in others and number == best, name not in others)
        for name, number in numbers.items()
    }
