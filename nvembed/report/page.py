"""`report.html`: one self-contained page, no script, nothing from the network; reads on a phone and on paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvembed.report.charts import bar_chart, line_chart
from nvembed.report.comparisons import MEAN
from nvembed.report.markup import Content, Markup, join, table, tag
from nvembed.report.schema import Report
from nvembed.report.scores import (
    comparisons_section,
    retrieval_values,
    scores_section,
    section,
    signed,
    system_name,
)
from nvembed.report.style import STYLE

REASONS = {
    "known_positive": "known positive",
    "duplicate_of_positive_or_query": "same text as the positive or query",
    "too_close_to_positive": "too close to the positive",
    "repeats_a_kept_negative": "repeats a kept negative",
}
Curves = Mapping[str, list[dict[str, Any]]]


def render(report: Report, curves: Curves) -> str:
    """The page.

    Args:
        report: what to show.
        curves: rows of `metrics.jsonl` by training step.
    """
    title = f"nvembed: {report.recipe}"
    sections = [
        _headline(report),
        scores_section(report),
        comparisons_section(report),
        _student(report),
        _training(report, curves),
        _mining(report),
        _datasets(report),
        _steps(report),
        _lineage(report),
        _environment(report),
    ]
    head = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", title),
            tag("style", Markup(STYLE)),
        ]
    )
    page = tag("html", tag("head", head), tag("body", tag("main", _top(report), *sections)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _top(report: Report) -> Markup:
    environment = report.environment
    memory = "" if report.peak_pss_mb is None else f", {report.peak_pss_mb / 1024:.2f} GiB at most"
    revision = (environment.git_revision or "unknown")[:12]
    facts = f"{environment.date} · {duration(report.wall_seconds)}{memory} · revision {revision}"
    return tag("header", tag("h1", "nvembed ", tag("span", report.recipe)), tag("p", facts, class_="quiet"))


def duration(seconds: float) -> str:
    """Seconds in words: `48.1 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# -- headline -------------------------------------------------------------------------------------------------------


def _headline(report: Report) -> Markup | None:
    cards: list[Markup] = []
    tables = {**report.baselines, **report.scores}
    for name in ("teacher", "student"):
        values = retrieval_values(tables.get(name, {}))
        if values:
            sets = f"mean nDCG@10 of {len(values)} retrieval set{'s' if len(values) > 1 else ''}"
            cards.append(_card(name, f"{sum(values) / len(values):.3f}", sets))
    for difference in report.comparisons:
        if difference.over == MEAN and difference.b in ("untrained", "bm25", "student_before"):
            what = f"{system_name(difference.a)} against {system_name(difference.b)}"
            low, high = signed(difference.low), signed(difference.high)
            cards.append(_card(what, signed(difference.value), f"nDCG@10, 95 % interval {low} to {high}"))
    for share in report.shares:
        note = "of the teacher's mean nDCG@10"
        if share.system != "student":
            note += f"; {100 * share.of_student:.0f} % of the full student's"
        cards.append(_card(f"{system_name(share.system)} keeps", f"{100 * share.of_teacher:.0f} %", note))
    return tag("section", tag("h2", "In short"), tag("dl", *cards, class_="cards")) if cards else None


def _card(title: str, value: str, note: str) -> Markup:
    return tag("div", tag("dt", title), tag("dd", tag("strong", value), tag("span", note)))


# -- what happened --------------------------------------------------------------------------------------------------


def _student(report: Report) -> Markup | None:
    """Closeness to the teacher before and after, size and encode cost, from `comparison.json`."""
    if report.student is None:
        return None
    cosine, cost = report.student["cosine_to_teacher"], report.student["encode_cost"]
    widths = sorted((key for key, found in cosine["after"].items() if isinstance(found, dict)), key=int, reverse=True)
    near: list[list[Content]] = [
        [f"{width} dims", *(_interval(cosine[when].get(width)) for when in ("before", "after"))] for width in widths
    ]
    said = f"Cosine over {cosine['texts']} texts the student never saw; after training: {cosine['after']['through']}."
    what = {"parameters": "parameters", "bytes": "bytes of weights"}
    both = [_side_by_side(label, report.student[key]) for key, label in what.items()]
    both.append(_side_by_side(cost["unit"], cost))
    how = f"Cost: the same {cost['texts']} texts in turns, {cost['threads']} thread(s), {cost['precision']}."
    return section(
        "Student against teacher",
        tag("p", said, class_="quiet"),
        table("Cosine to the teacher", ["width", "before training", "after training"], near) if near else None,
        table("Size and cost", ["measure", "teacher", "student", "student's share"], both),
        tag("p", how, class_="quiet"),
    )


def _interval(found: Mapping[str, float] | None) -> Content:
    if found is None:
        return None
    return join([f"{found['value']:.3f}", tag("small", f"{found['low']:.3f}–{found['high']:.3f}")])


def _side_by_side(label: str, found: Mapping[str, Any]) -> list[Content]:
    return [label, _plain(found["teacher"]), _plain(found["student"]), f"{100 * found['ratio']:.0f} %"]


def _plain(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _training(report: Report, curves: Curves) -> Markup | None:
    charts = [
        line_chart(
            f"{name}: loss",
            "optimiser step",
            "loss",
            [float(row["step"]) for row in rows],
            [float(row["loss"]) for row in rows],
        )
        for name, rows in curves.items()
    ]
    rows = [
        [
            name,
            run.steps,
            _plain(run.first_loss),
            _plain(run.last_loss),
            "–" if run.workers is None else f"{run.workers} × {run.threads_per_worker} threads",
            run.precision,
        ]
        for name, run in report.training.items()
    ]
    head = ["step", "optimiser steps", "first loss", "last loss", "workers", "precision"]
    summary = table("Training steps", head, rows) if rows else None
    return section("Training", tag("div", *charts, class_="charts") if charts else None, summary)


def _mining(report: Report) -> Markup | None:
    if report.mining is None:
        return None
    sets: Mapping[str, Any] = report.mining["datasets"]
    rows = []
    for name, audit in sets.items():
        dropped = sum(audit["dropped"].values())
        fewer = f"{100 * audit['with_fewer_share']:.1f} %"
        rows.append(
            [
                name,
                audit["examples"],
                audit["mined"],
                dropped,
                audit["negatives"],
                fewer,
                tag("span", audit["way"], class_="wrap"),
            ]
        )
    head = ["data set", "examples", "mined", "dropped", "negatives", "fewer than asked", "way"]
    refused = [
        [
            name,
            audit["candidates_decided"],
            *(f"{100 * audit['rejected'][r]['share']:.1f} %" for r in audit["rejected"]),
        ]
        for name, audit in sets.items()
        if audit["candidates_decided"]
    ]
    reasons = list(dict.fromkeys(reason for audit in sets.values() for reason in audit["rejected"]))
    refused_head = ["data set", "candidates", *(REASONS.get(reason, reason.replace("_", " ")) for reason in reasons)]
    charts = []
    for name, audit in sets.items():
        series = {kind: audit["score_histograms"][kind] for kind in ("positives", "negatives", "rejected")}
        if any(any(counts) for counts in series.values()):
            edges = audit["score_histograms"]["edges"]
            charts.append(bar_chart(f"{name}: scores", "similarity to the query", "share", edges, series))
    return section(
        "Mining audit",
        table("What was mined", head, rows),
        table("Candidates refused, by reason", refused_head, refused) if refused else None,
        tag("div", *charts, class_="charts") if charts else None,
    )


def _share(counted: Mapping[str, Any] | None) -> str | None:
    return None if counted is None else f"{100 * counted['share']:.1f} %"


def _datasets(report: Report) -> Markup | None:
    if not report.datasets:
        return None
    counts: list[list[Content]] = [
        [name, d.task, d.train, d.dev, d.test, d.documents, d.near_copies_dropped, d.near_copies_left, d.rejected]
        for name, d in report.datasets.items()
    ]
    head = ["data set", "task", "train", "dev", "test", "documents", "copies dropped", "copies left", "rejected"]
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
        table("Examples, documents and near copies across the split", head, counts),
        table("How held-out data was kept apart", rule_head, rules, numeric=False),
    )


def _steps(report: Report) -> Markup | None:
    rows = [
        [
            step.name,
            step.status,
            duration(step.seconds),
            None if step.peak_pss_mb is None else f"{step.peak_pss_mb:,.0f} MiB",
        ]
        for step in report.steps
    ]
    return section("Steps", table("Time and memory (sum of PSS)", ["step", "status", "time", "peak memory"], rows))


def _lineage(report: Report) -> Markup | None:
    owner = {entry.manifest_hash: name for name, entry in report.lineage.items()}
    rows: list[list[Content]] = []
    for name, entry in report.lineage.items():
        inputs = [
            tag("div", f"{role}: {owner.get(found.manifest_hash, found.uri)} ", tag("code", found.manifest_hash[:12]))
            for role, found in entry.inputs.items()
        ]
        rows.append([name, tag("code", entry.manifest_hash[:12]), join(inputs) if inputs else None])
    registered = [
        tag("li", f"{found['registry_uri']}: ", ", ".join(found["aliases"]) or "no alias", f" ({found['reason']})")
        for found in report.registrations.values()
    ]
    return section(
        "Lineage",
        table("Each result and the results it was made from", ["step", "manifest", "inputs"], rows, numeric=False)
        if rows
        else None,
        tag("ul", *registered) if registered else None,
    )


def _environment(report: Report) -> Markup | None:
    e = report.environment
    rows: list[list[Content]] = [
        ["processor", f"{e.processor}, {e.cpus} CPUs, bf16 {'yes' if e.bf16 else 'no'}"],
        ["memory", f"{e.memory_gib} GiB"],
        ["system", f"{e.platform}, Python {e.python}"],
    ]
    rows += [[name, version] for name, version in e.packages.items()]
    return section("Environment", table("What the run ran on", ["what", "value"], rows, numeric=False))
