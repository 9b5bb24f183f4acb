"""`report.html`: one self-contained page, no script, nothing from the network; reads on a phone and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nvembed.evaluation.significance import MEAN
from nvembed.report.lineage_page import lineage_section
from nvembed.report.markup import Content, Markup, join, table, tag
from nvembed.report.mining_page import mining_section
from nvembed.report.schema import Environment, Report
from nvembed.report.scores import comparisons_section, retrieval_values, scores_section
from nvembed.report.student_page import sizes_section, student_section
from nvembed.report.style import STYLE
from nvembed.report.training_page import datasets_section, mix_section, training_section
from nvembed.report.words import Section, contents, duration, memory, section, signed, system_name

GENERATOR = "nvembed report"  # tells our pages from files that somebody else made
Curves = Mapping[str, list[dict[str, Any]]]


def render(report: Report, curves: Curves) -> str:
    """The page of a run.

    Args:
        report: what to show.
        curves: rows of `metrics.jsonl` by training step.
    """
    sections = [
        _headline(report),
        scores_section(report),
        comparisons_section(report),
        sizes_section(report),
        student_section(report),
        training_section(report, curves),
        mix_section(report),
        mining_section(report),
        datasets_section(report),
        _steps(report),
        lineage_section(report),
        _environment(report.environment),
    ]
    heading = tag("h1", "nvembed ", tag("span", report.recipe))
    return whole_page(f"nvembed: {report.recipe}", join([heading, _facts(report)]), sections)


def whole_page(title: str, top: Markup, sections: Iterable[Section | None]) -> str:
    """A complete document: header with links to the sections, then the sections."""
    shown = [found for found in sections if found is not None]
    head = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("meta", name="generator", content=GENERATOR),
            tag("title", title),
            tag("style", Markup(STYLE)),
        ]
    )
    body = tag("body", tag("header", top, contents(shown)), tag("main", *(found.markup for found in shown)))
    return f"<!DOCTYPE html>\n{tag('html', tag('head', head), body, lang='en')}\n"


def _facts(report: Report) -> Markup:
    environment = report.environment
    most = "" if report.peak_pss_mb is None else f", {report.peak_pss_mb / 1024:.2f} GiB at most"
    revision = (environment.git_revision or "unknown")[:12]
    facts = f"{environment.date} · {duration(report.wall_seconds)}{most} · revision {revision}"
    return tag("p", facts, class_="quiet")


# -- headline -------------------------------------------------------------------------------------------------------


def _headline(report: Report) -> Section | None:
    cards: list[Markup] = []
    tables = {**report.baselines, **report.scores}
    for name in ("teacher", "student"):
        values = retrieval_values(tables.get(name, {}))
        if values:
            sets = f"mean nDCG@10 of {len(values)} retrieval set{'s' if len(values) > 1 else ''}"
            cards.append(card(name, f"{sum(values) / len(values):.3f}", sets))
    for difference in report.comparisons:
        if difference.over == MEAN and difference.b in ("untrained", "bm25", "student_before"):
            what = f"{system_name(difference.a)} against {system_name(difference.b)}"
            low, high = signed(difference.low), signed(difference.high)
            cards.append(card(what, signed(difference.value), f"nDCG@10, 95 % interval {low} to {high}"))
    for share in report.shares:
        note = "of the teacher's mean nDCG@10"
        if share.system != "student":
            note += f"; {100 * share.of_student:.0f} % of the full student's"
        cards.append(card(f"{system_name(share.system)} keeps", f"{100 * share.of_teacher:.0f} %", note))
    return section("In short", tag("dl", *cards, class_="cards") if cards else None)


def card(title: str, value: str, note: str) -> Markup:
    """One number with its name and what it is."""
    return tag("div", tag("dt", title), tag("dd", tag("strong", value), tag("span", note)))


# -- what happened --------------------------------------------------------------------------------------------------


def _steps(report: Report) -> Section | None:
    rows = [[step.name, step.status, duration(step.seconds), memory(step.peak_pss_mb)] for step in report.steps]
    return section("Steps", table("Time and memory (sum of PSS)", ["step", "status", "time", "peak memory"], rows))


def _environment(e: Environment) -> Section | None:
    rows: list[list[Content]] = [[what, value] for what, value in environment_facts(e).items()]
    return section("Environment", table("What the run ran on", ["what", "value"], rows, numeric=False))


def environment_facts(e: Environment) -> dict[str, str]:
    """Machine and versions in words."""
    return {
        "processor": f"{e.processor}, {e.cpus} CPUs, bf16 {'yes' if e.bf16 else 'no'}",
        "memory": f"{e.memory_gib} GiB",
        "system": f"{e.platform}, Python {e.python}",
        **e.packages,
    }
