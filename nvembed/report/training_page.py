"""What was learned from and how it went: curves, the data mix, data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from nvembed.report.charts import line_chart
from nvembed.report.collect import gap
from nvembed.report.markup import Content, Markup, table, tag
from nvembed.report.schema import Mixed, Report, Training
from nvembed.report.words import Section, percent, plain, section, signed

Rows = Sequence[Mapping[str, Any]]


def training_section(report: Report, curves: Mapping[str, Rows]) -> Section | None:
    """Loss and gap curves with marks where a run was restarted, and each training step in numbers."""
    charts = [chart for name, rows in curves.items() for chart in _curves(name, rows, report.training[name])]
    rows: list[list[Content]] = [
        [
            name,
            run.steps,
            plain(run.first_loss),
            plain(run.last_loss),
            _from_to(run.first_gap, run.last_gap),
            len(run.restarts),
            "–" if run.workers is None else f"{run.workers} × {run.threads_per_worker} threads",
            run.precision,
        ]
        for name, run in report.training.items()
    ]
    head = ["step", "optimiser steps", "first loss", "last loss", "gap", "restarts", "workers", "precision"]
    said = []
    if any(run.first_gap is not None for run in report.training.values()):
        said.append("Gap: mean cosine of a query to its positive minus that to its hardest negative in the batch.")
    if any(run.restarts for run in report.training.values()):
        said.append("▼ marks an optimiser step at which the run went on after it had been stopped.")
    return section(
        "Training",
        tag("p", " ".join(said), class_="quiet") if said else None,
        tag("div", *charts, class_="charts") if charts else None,
        table("Training steps", head, rows) if rows else None,
        _restarts(report.training),
    )


def _curves(name: str, rows: Rows, run: Training) -> list[Markup]:
    marks = [float(restart.step) for restart in run.restarts]
    steps, losses = [float(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    charts = [line_chart(f"{name}: loss", "optimiser step", "loss", steps, losses, marks)]
    gaps = [(float(row["step"]), found) for row in rows if (found := gap(row)) is not None]
    if gaps:
        xs, ys = [x for x, _ in gaps], [y for _, y in gaps]
        charts.append(line_chart(f"{name}: gap", "optimiser step", "gap", xs, ys, marks))
    return charts


def _from_to(first: float | None, last: float | None) -> str | None:
    return None if first is None or last is None else f"{signed(first)} → {signed(last)}"


def _restarts(training: Mapping[str, Training]) -> Markup | None:
    rows: list[list[Content]] = [
        [name, restart.step, datetime.fromtimestamp(restart.time, UTC).isoformat(timespec="seconds"), run_size]
        for name, run in training.items()
        for restart in run.restarts
        for run_size in (restart.world_size,)
    ]
    head = ["step", "went on at optimiser step", "time", "workers"]
    return table("Restarts", head, rows) if rows else None


# -- the mix ----------------------------------------------------------------------------------------------------------


def mix_section(report: Report) -> Section | None:
    """Every training stream: what the recipe asked of each data set, and what the optimiser was given."""
    if not report.mixes:
        return None
    blocks = []
    for step, mix in report.mixes.items():
        blocks.append(_mix_table(step, mix) if _weighted(mix) else _texts_table(step, mix))
        if len({found.task for found in mix.values()}) > 1:
            blocks.append(_task_table(step, mix))
    said = (
        "Asked: a data set's share of the weights in the recipe. Realised: its share of the examples that were drawn. "
        "Epochs above 1 mean that examples were seen again."
    )
    return section("Data mix", tag("p", said, class_="quiet"), *blocks)


def _weighted(mix: Mapping[str, Mixed]) -> bool:
    return any(found.weight is not None for found in mix.values())


def _mix_table(step: str, mix: Mapping[str, Mixed]) -> Markup:
    rows: list[list[Content]] = [
        [
            name,
            found.task,
            plain(found.weight),
            percent(found.asked),
            percent(found.realised),
            found.rows,
            found.usable,
            f"{found.epochs:.2f}",
        ]
        for name, found in mix.items()
    ]
    head = ["data set", "task", "weight", "asked", "realised", "examples drawn", "to draw from", "epochs"]
    return table(f"{step}: data sets", head, rows)


def _texts_table(step: str, mix: Mapping[str, Mixed]) -> Markup:
    rows: list[list[Content]] = [
        [name, found.task, percent(found.realised), found.usable, f"{found.epochs:.2f}"] for name, found in mix.items()
    ]
    head = ["data set", "task", "realised", "teacher vectors", "epochs"]
    return table(f"{step}: teacher vectors by data set (no weights: every text counts alike)", head, rows)


def _task_table(step: str, mix: Mapping[str, Mixed]) -> Markup:
    rows: list[list[Content]] = []
    for task in dict.fromkeys(found.task for found in mix.values()):
        ours = [found for found in mix.values() if found.task == task]
        asked = [found.asked for found in ours if found.asked is not None]
        rows.append([task or "unknown", percent(sum(asked)) if asked else None, percent(sum(o.realised for o in ours))])
    return table(f"{step}: tasks", ["task", "asked", "realised"], rows)


# -- data sets --------------------------------------------------------------------------------------------------------


def datasets_section(report: Report) -> Section | None:
    """Counts, caps, and how held-out data was kept apart."""
    if not report.datasets:
        return None
    sources = (report.resolved_recipe.get("prepare") or {}).get("sources") or []
    caps = {source["name"]: _caps(source) for source in sources if "name" in source}
    counts: list[list[Content]] = [
        [
            name,
            d.task,
            d.train,
            d.dev,
            d.test,
            d.documents,
            caps.get(name),
            d.near_copies_dropped,
            d.near_copies_left,
            d.rejected,
        ]
        for name, d in report.datasets.items()
    ]
    head = [
        "data set", "task", "train", "dev", "test", "documents", "at most", "copies dropped", "copies left", "rejected",
    ]  # fmt: skip
    rules: list[list[Content]] = [
        [
            name,
            d.split_rule,
            "synthetic labels" if d.synthetic else "real labels",
            d.licence,
            tag("code", d.evaluation_hash[:12]),
        ]
        for name, d in report.datasets.items()
    ]
    rule_head = ["data set", "split rule", "labels", "licence", "evaluation hash"]
    return section(
        "Data sets",
        table("Examples, documents and near duplicates across the split", head, counts),
        table("How held-out data was kept apart", rule_head, rules, numeric=False),
    )


def _caps(source: Mapping[str, Any]) -> str | None:
    """What the recipe asks of a source: `1,000 documents, 300 test`."""
    limits = {key.removeprefix("max_"): value for key, value in source.items() if key.startswith("max_") and value}
    return ", ".join(f"{value:,} {key}" for key, value in limits.items() if isinstance(value, int)) or None
