"""The score tables, their charts and the differences of `report.html`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nvembed.report.charts import Dot, dot_chart
from nvembed.report.comparisons import MEAN, RETRIEVAL_METRIC
from nvembed.report.markup import Content, Markup, join, table, tag
from nvembed.report.schema import Difference, Interval, Report, Table

METRIC_NAMES = {
    "ndcg_at_10": "nDCG@10",
    "recall_at_100": "recall@100",
    "mrr_at_10": "MRR@10",
    "accuracy": "k-NN accuracy",
    "v_measure": "v-measure",
    "spearman": "Spearman",
}
SYSTEM_NAMES = {
    "bm25": "BM25",
    "minilm": "MiniLM",
    "untrained": "untrained backbone",
    "student_before": "student before training",
}


def system_name(system: str) -> str:
    """What a system is called on the page: `student@288` is "student, 288 dims"."""
    name, at, dim = system.partition("@")
    return SYSTEM_NAMES.get(name, name) + (f", {dim} dims" if at else "")


def metric_name(metric: str) -> str:
    """What a metric is called on the page."""
    return METRIC_NAMES.get(metric, metric)


def section(title: str, *content: Content) -> Markup | None:
    """A titled section; None when all of its content is."""
    shown = [part for part in content if part is not None]
    return tag("section", tag("h2", title), *shown) if shown else None


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def _range(low: float, high: float) -> Markup:
    return tag("small", f"{low:.3f}–{high:.3f}")


def retrieval_values(scores: Table) -> list[float]:
    """Primary scores of a system on the retrieval sets."""
    return [metrics[RETRIEVAL_METRIC].value for metrics in scores.values() if RETRIEVAL_METRIC in metrics]


def scores_section(report: Report) -> Markup | None:
    """Overview, then chart and full table of every data set."""
    systems = _ordered_systems(report)
    found = dict.fromkeys(dataset for scores in systems.values() for dataset in scores)
    datasets = sorted(found, key=lambda dataset: _rank(_primary(systems, dataset)))
    if not datasets:
        return None
    blocks = [_dataset_scores(dataset, systems, report) for dataset in datasets]
    legend = (
        "Measured on held-out data only. The range below a value is its 95 % bootstrap interval. "
        "★ marks the best value of a column. Charts: ○ baseline, ● teacher, ■ student."
    )
    return section(
        "Scores", tag("p", legend, class_="quiet"), _overview(systems, datasets, report), *blocks, *_notes(report)
    )


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
    """Baselines, teacher, student before, student, each at full width first: the order in which one reads the table."""
    tables = {**report.baselines, **report.scores, **report.other_scores}
    roles = [*report.baselines, "teacher", "student_before", "student"]
    order = [name for role in roles for name in tables if name.partition("@")[0] == role]
    return {name: tables[name] for name in dict.fromkeys([*order, *tables])}


def _synthetic(report: Report, dataset: str) -> bool:
    return dataset in report.datasets and report.datasets[dataset].synthetic


def _rank(metric: str) -> int:
    return [*METRIC_NAMES, metric].index(metric)


def _primary(systems: Mapping[str, Table], dataset: str) -> str:
    return next(iter(next(scores[dataset] for scores in systems.values() if dataset in scores)))


def _best(values: Iterable[Interval | None]) -> float:
    return max((value.value for value in values if value is not None), default=float("nan"))


def _cell(value: Interval | None, best: float) -> Content:
    if value is None:
        return None
    text: list[Content] = [f"{value.value:.3f}"]
    if value.value == best:
        text = [tag("b", tag("span", "★", aria_hidden="true"), tag("span", "best: ", class_="unseen"), text[0])]
    return join([*text, _range(value.low, value.high)])


def _overview(systems: Mapping[str, Table], datasets: list[str], report: Report) -> Markup:
    """Primary metric of every system on every data set, and the mean over the retrieval sets."""
    primary = {dataset: _primary(systems, dataset) for dataset in datasets}
    retrieval = [dataset for dataset in datasets if primary[dataset] == RETRIEVAL_METRIC]

    def value(scores: Table, dataset: str) -> Interval | None:
        return scores.get(dataset, {}).get(primary[dataset])

    best = {dataset: _best(value(scores, dataset) for scores in systems.values()) for dataset in datasets}
    means = {
        name: sum(retrieval_values(scores)) / len(retrieval)
        for name, scores in systems.items()
        if retrieval and len(retrieval_values(scores)) == len(retrieval)
    }
    rows = []
    for name, scores in systems.items():
        mean = f"{means[name]:.3f}" if name in means else None
        marked = tag("b", f"★{mean}") if mean is not None and means[name] == max(means.values()) else mean
        cells = [_cell(value(scores, dataset), best[dataset]) for dataset in datasets]
        rows.append([system_name(name), *([marked] if retrieval else []), *cells])
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
    best = {metric: _best(values.get(metric) for values in shown.values()) for metric in metrics}
    rows = [
        [system_name(name), *(_cell(values.get(metric), best[metric]) for metric in metrics)]
        for name, values in shown.items()
    ]
    first = metrics[0]
    dots = [
        Dot(_label(name), _kind(name), values[first].value, values[first].low, values[first].high)
        for name, values in shown.items()
        if first in values
    ]
    said = "The labels of this set are synthetic."
    note = tag("p", said, class_="quiet") if _synthetic(report, dataset) else None
    chart = dot_chart(f"{dataset}: {metric_name(first)}", f"{metric_name(first)}, 95 % interval", dots)
    full = table(f"{dataset}: all metrics", ["system", *map(metric_name, metrics)], rows)
    return tag("article", tag("h3", dataset), note, tag("div", chart, full, class_="pair"))


def _label(system: str) -> str:
    """A system's name, short enough for a chart."""
    return {"untrained": "untrained", "student_before": "before"}.get(
        system, system.replace("student_before", "before") if "@" in system else system_name(system)
    )


def _kind(system: str) -> str:
    if system.startswith("teacher"):
        return "teacher"
    return "student" if system.startswith("student") and "before" not in system else "baseline"


def comparisons_section(report: Report) -> Markup | None:
    """Paired differences."""
    if not report.comparisons:
        return None
    text = (
        "Differences on the same items, with their own paired-bootstrap 95 % intervals. "
        "A difference is clear where the interval leaves out zero."
    )
    pairs = dict.fromkeys((found.a, found.b) for found in report.comparisons)
    tables = [
        table(
            f"{system_name(a)} − {system_name(b)}",
            ["over", "difference", "clear"],
            [_comparison(found) for found in report.comparisons if (found.a, found.b) == (a, b)],
        )
        for a, b in pairs
    ]
    return section("Differences", tag("p", text, class_="quiet"), tag("div", *tables, class_="tables"))


def _comparison(found: Difference) -> list[Content]:
    over = tag("b", found.over) if found.over == MEAN else tag("span", found.over)
    interval = tag("small", f"{signed(found.low)} to {signed(found.high)}")
    where = join([over, tag("small", metric_name(found.metric))])
    return [where, join([signed(found.value), interval]), "yes" if found.clear else "no"]
