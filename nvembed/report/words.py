"""Names of metrics and systems, and formats of numbers, on the pages; templates use these functions as filters."""

from __future__ import annotations

import re
from datetime import UTC, datetime

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


def score(value: float) -> str:
    """A score with three decimals."""
    return f"{value:.3f}"


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def plain(value: float | None) -> str:
    """A count, or a number with four digits."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def percent(share: float | None) -> str | None:
    """A share in percent."""
    return None if share is None else f"{100 * share:.1f} %"


def memory(mebibytes: float | None) -> str | None:
    """Memory in MiB."""
    return None if mebibytes is None else f"{mebibytes:,.0f} MiB"


def megabytes(size: int) -> str:
    """Bytes in MB or GB."""
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def duration(seconds: float) -> str:
    """Seconds in words: `48.1 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def utc(seconds: float) -> str:
    """A time in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def slug(title: str) -> str:
    """A title as the address of its section."""
    return re.sub(r"\W+", "-", title.lower())


FILTERS = {
    function.__name__: function
    for function in (
        metric_name, system_name, score, signed, plain, percent, memory, megabytes, duration, utc, slug,
    )
}  # fmt: skip
