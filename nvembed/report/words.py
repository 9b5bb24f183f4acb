"""What the pages call things, and the parts they share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nvembed.report.markup import Content, Markup, join, tag
from nvembed.report.schema import Interval

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
    "champion_teacher": "teacher champion before",
    "champion_student": "student champion before",
}


@dataclass(frozen=True)
class Section:
    """A titled part of a page; `key` is its address on the page."""

    title: str
    key: str
    markup: Markup


def section(title: str, *content: Content) -> Section | None:
    """A titled section; None when all of its content is."""
    shown = [part for part in content if part is not None]
    if not shown:
        return None
    key = re.sub(r"\W+", "-", title.lower())
    return Section(title, key, tag("section", tag("h2", title, id=key), *shown, aria_labelledby=key))


def contents(sections: Iterable[Section]) -> Markup:
    """Links to the sections."""
    links = [tag("li", tag("a", found.title, href=f"#{found.key}")) for found in sections]
    return tag("nav", tag("ul", *links), aria_label="Sections")


def system_name(system: str) -> str:
    """What a system is called on a page: `student@288` is "student, 288 dims"."""
    name, at, dim = system.partition("@")
    return SYSTEM_NAMES.get(name, name) + (f", {dim} dims" if at else "")


def short_name(system: str) -> str:
    """A system's name, short enough for a chart."""
    name, at, dim = system.partition("@")
    short = {"untrained": "untrained", "student_before": "before"}.get(name, SYSTEM_NAMES.get(name, name))
    return short.removesuffix(" before") + (f"@{dim}" if at else "")


def kind(system: str) -> str:
    """Which mark a system has in charts."""
    if system.startswith("champion"):
        return "champion"
    if system.startswith("teacher"):
        return "teacher"
    return "student" if system.startswith("student") and "before" not in system else "baseline"


def metric_name(metric: str) -> str:
    """What a metric is called on a page."""
    return METRIC_NAMES.get(metric, metric)


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def span(low: float, high: float) -> Markup:
    """An interval, small, below its value."""
    return tag("small", f"{low:.3f}–{high:.3f}")


def with_interval(found: Interval | Mapping[str, Any] | None) -> Content:
    """A value with its interval; None stays."""
    if found is None:
        return None
    value = found if isinstance(found, Interval) else Interval(**found)
    return join([f"{value.value:.3f}", span(value.low, value.high)])


def plain(value: float | None) -> str:
    """A number for a table."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def percent(share: float | None, digits: int = 1) -> str | None:
    """A share in percent."""
    return None if share is None else f"{100 * share:.{digits}f} %"


def memory(mebibytes: float | None) -> str | None:
    """Memory for a table."""
    return None if mebibytes is None else f"{mebibytes:,.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds in words: `48.1 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
