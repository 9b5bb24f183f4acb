"""The score tables, their charts and the differences of `report.html`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nvembed.evaluation.significance import MEAN, RETRIEVAL_METRIC
from nvembed.report.charts import Dot, dot_chart
from nvembed.report.markup import Content, Markup, join, table, tag
from nvembed.report.schema import Difference, Interval, Report, Table
from nvembed.report.systems import CHAMPION, in_reading_order
from nvembed.report.words import (
    METRIC_NAMES,
    Section,
    kind,
    metric_name,
    section,
    short_name,
    signed,
    span,
    system_name,
)


def retrieval_values(scores: Table) -> list[float]:
    """Primary scores of a system on the retrieval sets."""
    return [metrics[RETRIEVAL_METRIC].value for metrics in scores.values() if RETRIEVAL_METRIC in metrics]


def scores_section(report: Report) -> Section | None:
    """Overview, then chart and full table of every data set."""
    systems = _ordered_systems(report)
    found = dict.fromkeys(dataset for scores in systems.values() for dataset in scores)
    datasets = sorted(found, key=lambda dataset: _rank(_primary(systems, dataset)))
    if not datasets:
        return None
    blocks = [_dataset_scores(dataset, systems, report) for dataset in datasets]
    champions = ", ◆ champion before this run" if report.champions else ""
    legend = (
        "Measured on held-out data only. The range below a value is its 95 % bootstrap interval. "
        f"★ marks the best value of a column. Charts: ○ baseline, ● teacher, ■ student{champions}."
    )
    return section(
        "Scores",
        tag("p", legend, class_="quiet"),
        *_about_champions(report),
        _overview(systems, datasets, report),
        *blocks,
        *_notes(report),
    )


def _about_champions(report: Report) -> list[Markup]:
    """Which versions the champions' rows are, and where their examples were others."""
    said = []
    for role, champion in report.champions.items():
        text = f"{system_name(CHAMPION + role)}: version {champion.version}, as it was scored when it was registered."
        if champion.other_sets:
            text += (
                f" Its held-out examples were others than this run's in {', '.join(champion.other_sets)} "
                "(the evaluation hashes differ): those values are marked ≠ and cannot be compared."
            )
        said.append(tag("p", text, class_="quiet"))
    return said


def _notes(report: Report) -> list[Markup]:
    """How the numbers were taken, and in which form the untrained backbone was at its best."""
    notes = dict(report.notes)
    if report.untrained_variants is not None:
        chosen = ", ".join(f"{dataset}: {form}" for dataset, form in report.untrained_variants["chosen"].items())
        notes["untrained backbone, form chosen on dev"] = chosen
    if not notes:
        return []
    entries = [part for name, text in notes.items() for part in (tag("dt", name), tag("dd", text))]
    return [tag("h3", "How the scores were taken"), tag("dl", *entries, class_="notes")]


def _ordered_systems(report: Report) -> dict[str, Table]:
    """All of a report; of champions what this run was scored on too."""
    ours = {**report.baselines, **report.scores, **report.other_scores}
    known = {dataset for scores in ours.values() for dataset in scores}
    tables = ours | {
        CHAMPION + role: {dataset: metrics for dataset, metrics in champion.scores.items() if dataset in known}
        for role, champion in report.champions.items()
    }
    return in_reading_order(tables)


def _champion_means(report: Report, retrieval_sets: int) -> dict[str, Interval]:
    """Of champions that were scored on as many retrieval sets; over more of them a mean would be another number."""
    return {
        CHAMPION + role: champion.mean
        for role, champion in report.champions.items()
        if champion.mean is not None and len(retrieval_values(champion.scores)) == retrieval_sets
    }


def _synthetic(report: Report, dataset: str) -> bool:
    return dataset in report.datasets and report.datasets[dataset].synthetic


def _rank(metric: str) -> int:
    return [*METRIC_NAMES, metric].index(metric)


def _primary(systems: Mapping[str, Table], dataset: str) -> str:
    return next(iter(next(scores[dataset] for scores in systems.values() if dataset in scores)))


def _best(values: Iterable[Interval | None]) -> float:
    return max((value.value for value in values if value is not None), default=float("nan"))


def _comparable(report: Report, system: str, dataset: str) -> bool:
    """Whether a system was scored on this run's held-out examples; only a champion may not have been."""
    champion = report.champions.get(system.removeprefix(CHAMPION)) if system.startswith(CHAMPION) else None
    return champion is None or dataset not in champion.other_sets


def _cell(value: Interval | float | None, best: float, comparable: bool = True) -> Content:
    """A value, starred where it is the best; a mean of an older report or registration has no interval."""
    if value is None:
        return None
    point = _point(value)
    text: list[Content] = [f"{point:.3f}"]
    if not comparable:
        text = [tag("span", "≠", aria_hidden="true"), tag("span", "other examples: ", class_="unseen"), text[0]]
    elif point == best:
        text = [tag("b", tag("span", "★", aria_hidden="true"), tag("span", "best: ", class_="unseen"), text[0])]
    return join([*text, span(value.low, value.high) if isinstance(value, Interval) else None])


def _point(value: Interval | float) -> float:
    return value.value if isinstance(value, Interval) else value


def _overview(systems: Mapping[str, Table], datasets: list[str], report: Report) -> Markup:
    """Primary metric of every system on every data set, and the mean over the retrieval sets."""
    primary = {dataset: _primary(systems, dataset) for dataset in datasets}
    retrieval = [dataset for dataset in datasets if primary[dataset] == RETRIEVAL_METRIC]

    def value(scores: Table, dataset: str) -> Interval | None:
        return scores.get(dataset, {}).get(primary[dataset])

    def fair(name: str, dataset: str) -> Interval | None:
        return value(systems[name], dataset) if _comparable(report, name, dataset) else None

    best = {dataset: _best(fair(name, dataset) for name in systems) for dataset in datasets}
    with_interval = {**_champion_means(report, len(retrieval)), **report.means}
    means = {
        name: with_interval.get(name, sum(retrieval_values(scores)) / len(retrieval))
        for name, scores in systems.items()
        if retrieval and all(fair(name, dataset) is not None for dataset in retrieval)
    }
    most = max(map(_point, means.values()), default=float("nan"))
    rows = []
    for name, scores in systems.items():
        cells = [
            _cell(value(scores, dataset), best[dataset], _comparable(report, name, dataset)) for dataset in datasets
        ]
        rows.append([system_name(name), *([_cell(means.get(name), most)] if retrieval else []), *cells])
    notes = {
        dataset: metric_name(primary[dataset]) + (", synthetic" if _synthetic(report, dataset) else "")
        for dataset in datasets
    }
    heads = [join([dataset, tag("small", notes[dataset])]) for dataset in datasets]
    mean_head = [join(["mean", tag("small", "retrieval sets")])] if retrieval else []
    return table("Primary metric of every data set", ["system", *mean_head, *heads], rows)


def _dataset_scores(dataset: str, systems: Mapping[str, Table], report: Report) -> Markup:
    shown = {name: scores[dataset] for name, scores in systems.items() if dataset in scores}
    metrics = list(dict.fromkeys(metric for values in shown.values() for metric in values))
    fair = {name: values for name, values in shown.items() if _comparable(report, name, dataset)}
    best = {metric: _best(values.get(metric) for values in fair.values()) for metric in metrics}
    rows = [
        [
            system_name(name),
            *(_cell(values.get(metric), best[metric], _comparable(report, name, dataset)) for metric in metrics),
        ]
        for name, values in shown.items()
    ]
    first = metrics[0]
    dots = [
        Dot(short_name(name), kind(name), values[first].value, values[first].low, values[first].high)
        for name, values in fair.items()
        if first in values
    ]
    said = "The labels of this set are synthetic."
    note = tag("p", said, class_="quiet") if _synthetic(report, dataset) else None
    chart = dot_chart(f"{dataset}: {metric_name(first)}", f"{metric_name(first)}, 95 % interval", dots)
    full = table(f"{dataset}: all metrics", ["system", *map(metric_name, metrics)], rows)
    return tag("article", tag("h3", dataset), note, tag("div", chart, full, class_="pair"))


def comparisons_section(report: Report) -> Section | None:
    """Paired differences."""
    if not report.comparisons:
        return None
    text = (
        "Differences on the same items, with their own paired-bootstrap 95 % intervals. "
        "A difference is clear where the interval leaves out zero."
    )
    pairs = dict.fromkeys((found.a, found.b) for found in report.comparisons)
    tables = [
        differences_table(
            f"{system_name(a)} − {system_name(b)}",
            [found for found in report.comparisons if (found.a, found.b) == (a, b)],
        )
        for a, b in pairs
    ]
    return section("Differences", tag("p", text, class_="quiet"), tag("div", *tables, class_="tables"))


def differences_table(caption: str, found: Iterable[Difference]) -> Markup:
    """Paired differences of two systems, one data set a row."""
    return table(caption, ["over", "difference", "clear"], [_comparison(row) for row in found])


def _comparison(found: Difference) -> list[Content]:
    over = tag("b", found.over) if found.over == MEAN else tag("span", found.over)
    interval = tag("small", f"{signed(found.low)} to {signed(found.high)}")
    where = join([over, tag("small", metric_name(found.metric))])
    return [where, join([signed(found.value), interval]), "yes" if found.clear else "no"]
