"""Names of metrics and systems, and formats of values, on the pages; templates use `FILTERS`."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

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


def metric_name(metric: str) -> str:
    """The name of a metric."""
    return METRIC_NAMES.get(metric, metric)


def system_name(system: str) -> str:
    """The name of a system: `student@288` is "student, 288 dims"."""
    name, at, dim = system.partition("@")
    return SYSTEM_NAMES.get(name, name) + (f", {dim} dims" if at else "")


def short_name(system: str) -> str:
    """The name of a system in a chart."""
    name, at, dim = system.partition("@")
    short = {"untrained": "untrained", "student_before": "before"}.get(name, SYSTEM_NAMES.get(name, name))
    return short.removesuffix(" before") + (f"@{dim}" if at else "")


def mark_kind(system: str) -> str:
    """The mark of a system in charts."""
    if system.startswith("champion"):
        return "champion"
    if system.startswith("teacher"):
        return "teacher"
    return "student" if system.startswith("student") and "before" not in system else "baseline"


def duration(seconds: float) -> str:
    """Seconds in words: `48.1 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


FORMATS: dict[str, Callable[[Any], str]] = {
    "score": "{:.3f}".format,
    "signed": lambda number: f"{number:+.3f}".replace("-", "−"),
    "plain": lambda number: f"{number:,}" if isinstance(number, int) else f"{number:.4g}",  # a count, or four digits
    "percent": lambda share: f"{100 * share:.1f} %",
    "memory": "{:,.0f} MiB".format,
    "megabytes": lambda size: f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB",
    "duration": duration,
    "utc": lambda seconds: datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds"),
    "slug": lambda title: re.sub(r"\W+", "-", title.lower()),  # the address of a section
    "metric_name": metric_name,
    "system_name": system_name,
}


def _optional(text_of: Callable[[Any], str]) -> Callable[[Any], str | None]:
    """The format for values that can be missing; tables show a missing value as a dash."""
    return lambda value: None if value is None else text_of(value)


FILTERS = {name: _optional(text_of) for name, text_of in FORMATS.items()}
