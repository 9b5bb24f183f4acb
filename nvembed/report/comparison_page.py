"""The page of several runs beside each other; self-contained like the page of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from nvembed.evaluation.significance import MEAN
from nvembed.report.charts import Dot, Point, curves_chart, dot_chart, point_chart
from nvembed.report.collect import gap
from nvembed.report.compare import RunPair, Versus
from nvembed.report.markup import Content, Markup, join, table, tag
from nvembed.report.run_page import Curves, card, environment_facts, whole_page
from nvembed.report.runs import Run
from nvembed.report.schema import Interval, Report, StepRecord
from nvembed.report.scores import differences_table
from nvembed.report.student_page import measured_systems
from nvembed.report.systems import all_tables, mean_retrieval
from nvembed.report.words import (
    Section,
    duration,
    kind,
    memory,
    metric_name,
    percent,
    section,
    short_name,
    signed,
    system_name,
    with_interval,
)

HEADLINE = ("teacher", "student")


def render_versus(runs: Sequence[Run], versus: Versus, curves: Mapping[str, Curves]) -> str:
    """The page.

    Args:
        runs: the runs, labelled.
        versus: what `compare_runs` found.
        curves: rows of `metrics.jsonl` by run label and training step.
    """
    named = ", ".join(f"{run.label} {run.report.recipe}" for run in runs)
    sections = [
        _headline(versus),
        _recipes(versus),
        _scores(runs, versus),
        _differences(versus),
        _sizes(runs),
        _training(curves),
        _mixes(runs),
        _costs(runs),
        _models(runs),
        _environments(runs),
    ]
    top = [tag("h1", "nvembed ", tag("span", "runs ", ", ".join(run.label for run in runs))), _runs(runs)]
    return whole_page(f"nvembed: {named}", join(top), sections)


def _runs(runs: Sequence[Run]) -> Markup:
    entries: list[Markup] = []
    for run in runs:
        report = run.report
        most = "" if report.peak_pss_mb is None else f", {report.peak_pss_mb / 1024:.2f} GiB at most"
        revision = (report.environment.git_revision or "unknown")[:12]
        facts = f"{report.environment.date} · {duration(report.wall_seconds)}{most} · revision {revision} · "
        entries += [tag("dt", f"{run.label}: {report.recipe}"), tag("dd", facts, tag("code", run.source))]
    return tag("dl", *entries, class_="runs")


def _headline(versus: Versus) -> Section | None:
    """The mean difference of teacher and student, for each pair."""
    cards = [
        card(
            f"{system_name(system)}, {pair.later} − {pair.first}",
            signed(found.value),
            f"mean nDCG@10, 95 % interval {signed(found.low)} to {signed(found.high)}"
            + ("" if found.clear else ": not clear"),
        )
        for pair in versus.pairs
        for system in HEADLINE
        for found in pair.differences
        if found.over == MEAN and found.a == f"{pair.later} {system}"
    ]
    return section("In short", tag("dl", *cards, class_="cards") if cards else None)


def _recipes(versus: Versus) -> Section | None:
    blocks: list[Markup] = []
    for pair in versus.pairs:
        blocks.append(tag("h3", f"{pair.first} → {pair.later}"))
        lines = [tag("li", tag("code", line)) for line in pair.recipe]
        blocks.append(tag("ul", *lines, class_="changes") if lines else tag("p", "The recipes are the same."))
    return section("What differs in the recipes", *blocks)


# -- scores -----------------------------------------------------------------------------------------------------------


def _scores(runs: Sequence[Run], versus: Versus) -> Section | None:
    tables = {run.label: all_tables(run.report) for run in runs}
    systems = list(dict.fromkeys(name for found in tables.values() for name in found))
    datasets = dict.fromkeys(name for found in tables.values() for scores in found.values() for name in scores)
    if not datasets:
        return None
    differing = {name for pair in versus.pairs for name in pair.other_sets}
    heads = ["system", *(f"{run.label} {run.report.recipe}" for run in runs)]
    means: list[list[Content]] = [[system_name(name), *(_mean(run.report, name) for run in runs)] for name in systems]
    blocks = [_dataset(name, name in differing, systems, runs, heads) for name in datasets]
    said = (
        "Held-out data only; the range below a value is its own 95 % interval. Whether two runs differ is answered by "
        "the paired differences below, not by these ranges. ○ baseline, ● teacher, ■ student."
    )
    mean = table("Mean nDCG@10 of the retrieval sets", heads, means)
    note = tag("p", f"≠ The held-out examples differ in {', '.join(sorted(differing))}.") if differing else None
    return section("Scores", tag("p", said, class_="quiet"), note, mean, *blocks)


def _mean(report: Report, system: str) -> Content:
    """With its interval where the report has one; earlier versions wrote none."""
    if system in report.means:
        return with_interval(report.means[system])
    value = mean_retrieval(all_tables(report).get(system, {}))
    return None if value is None else f"{value:.3f}"


def _dataset(dataset: str, differs: bool, systems: Sequence[str], runs: Sequence[Run], heads: Sequence[str]) -> Markup:
    tables = [all_tables(run.report) for run in runs]
    metric = next(next(iter(found[name][dataset])) for found in tables for name in found if dataset in found[name])

    def value(number: int, system: str) -> Interval | None:
        return tables[number].get(system, {}).get(dataset, {}).get(metric)

    rows: list[list[Content]] = [
        [system_name(name), *cells]
        for name in systems
        if any(cells := [with_interval(value(number, name)) for number in range(len(runs))])
    ]
    dots = [
        Dot(f"{run.label} {short_name(name)}", kind(name), found.value, found.low, found.high)
        for name in systems
        if kind(name) != "baseline"
        for number, run in enumerate(runs)
        if (found := value(number, name)) is not None
    ]
    note = "≠ The runs were scored on other held-out examples here (evaluation hashes): values cannot be compared."
    chart = dot_chart(f"{dataset}: {metric_name(metric)}", f"{metric_name(metric)}, 95 % interval", dots)
    return tag(
        "article",
        tag("h3", dataset),
        tag("p", note) if differs else None,
        tag("div", chart, table(f"{dataset}: {metric_name(metric)}", heads, rows), class_="pair"),
    )


def _differences(versus: Versus) -> Section | None:
    blocks: list[Markup] = []
    for pair in versus.pairs:
        tables = [
            differences_table(f"{_long(a)} − {_long(b)}", [row for row in pair.differences if (row.a, row.b) == (a, b)])
            for a, b in dict.fromkeys((row.a, row.b) for row in pair.differences)
        ]
        blocks += [tag("div", *tables, class_="tables")] if tables else []
        blocks += _left_out(pair)
    said = (
        "The later run minus the first on the same items, with paired-bootstrap 95 % intervals. A difference is clear "
        "where the interval leaves out zero."
    )
    return section("Differences", tag("p", said, class_="quiet"), *blocks) if blocks else None


def _long(system: str) -> str:
    label, _, name = system.partition(" ")
    return f"{label} {system_name(name)}"


def _left_out(pair: RunPair) -> list[Markup]:
    if not pair.left_out:
        return []
    said = f"Not compared between {pair.first} and {pair.later}:"
    return [tag("p", said), tag("ul", *(tag("li", line) for line in pair.left_out))]


def _sizes(runs: Sequence[Run]) -> Section | None:
    points = [
        Point(f"{run.label} {short_name(name)}", kind(name), size.parameters / 1e6, mean.value, mean.low, mean.high)
        for run in runs
        for name, (size, mean) in measured_systems(run.report).items()
        if kind(name) != "baseline" and "@" not in name
    ]
    if not points:
        return None
    chart = point_chart("Quality by size", "million parameters", "mean nDCG@10", points)
    return section("Size and quality", tag("div", chart, class_="charts"))


# -- training ---------------------------------------------------------------------------------------------------------


def _training(curves: Mapping[str, Curves]) -> Section | None:
    charts = list(_overlaid(curves, "loss", lambda row: float(row["loss"])))
    gaps = list(_overlaid(curves, "gap", gap))
    said = "Gap: mean cosine of a query to its positive minus that to its hardest negative in the batch."
    both = charts + gaps
    return section(
        "Training",
        tag("p", said, class_="quiet") if gaps else None,
        tag("div", *both, class_="charts") if both else None,
    )


def _overlaid(curves: Mapping[str, Curves], what: str, value: Callable[..., float | None]) -> Iterator[Markup]:
    """A chart for each training step, the runs over each other."""
    for step in dict.fromkeys(step for found in curves.values() for step in found):
        lines = {
            label: [(float(row["step"]), number) for row in found[step] if (number := value(row)) is not None]
            for label, found in curves.items()
            if step in found
        }
        lines = {label: line for label, line in lines.items() if line}
        if lines:
            yield curves_chart(f"{step}: {what}", "optimiser step", what, lines)


def _mixes(runs: Sequence[Run]) -> Section | None:
    blocks = []
    for step in dict.fromkeys(step for run in runs for step in run.report.mixes):
        mixes = [run.report.mixes.get(step, {}) for run in runs]
        rows: list[list[Content]] = [
            [name, *(_share(found[name].realised, found[name].rows) if name in found else None for found in mixes)]
            for name in dict.fromkeys(name for found in mixes for name in found)
        ]
        blocks.append(table(f"{step}: realised", ["data set", *(run.label for run in runs)], rows))
    return section("Data mix", tag("div", *blocks, class_="tables") if blocks else None)


def _share(realised: float, rows: int | None) -> Content:
    return join([percent(realised), None if rows is None else tag("small", f"{rows:,} examples")])


# -- what it took -----------------------------------------------------------------------------------------------------


def _costs(runs: Sequence[Run]) -> Section | None:
    steps = [{step.name: step for step in run.report.steps} for run in runs]
    rows: list[list[Content]] = [
        [name, *(_cost(found.get(name)) for found in steps)]
        for name in dict.fromkeys(name for found in steps for name in found)
    ]
    total: list[Content] = [tag("b", "whole run"), *(_total(run.report) for run in runs)]
    heads = ["step", *(f"{run.label} {run.report.recipe}" for run in runs)]
    return section("Time and memory", table("Seconds of all attempts, peak memory (PSS)", heads, [total, *rows]))


def _cost(step: StepRecord | None) -> Content:
    if step is None:
        return None
    peak = memory(step.peak_pss_mb)
    return join([duration(step.seconds), None if peak is None else tag("small", peak)])


def _total(report: Report) -> Content:
    peak = memory(report.peak_pss_mb)
    return join([duration(report.wall_seconds), None if peak is None else tag("small", peak)])


def _models(runs: Sequence[Run]) -> Section | None:
    rows: list[list[Content]] = [
        [f"{run.label} {role}", model.registry_uri, tag("code", model.folder)]
        for run in runs
        for role, model in run.report.models.items()
    ]
    caption = "Models and where they are"
    return section("Models", table(caption, ["model", "registry", "folder"], rows, numeric=False)) if rows else None


def _environments(runs: Sequence[Run]) -> Section | None:
    facts = [environment_facts(run.report.environment) for run in runs]
    rows: list[list[Content]] = [
        [what, *(found.get(what) for found in facts)]
        for what in dict.fromkeys(what for found in facts for what in found)
        if len({found.get(what) for found in facts}) > 1
    ]
    if not rows:
        return section("Environment", tag("p", "The same machine type and versions."))
    heads = ["what", *(run.label for run in runs)]
    return section("Environment", table("What the runs do not share", heads, rows, numeric=False))
