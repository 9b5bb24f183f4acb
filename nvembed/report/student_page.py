"""What size and quality cost each other, and the student beside its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvembed.report.charts import Point, point_chart
from nvembed.report.markup import Content, Markup, table, tag
from nvembed.report.schema import Interval, Report, Size
from nvembed.report.systems import mean_retrieval
from nvembed.report.words import Section, kind, plain, section, short_name, system_name, with_interval


def sizes_section(report: Report) -> Section | None:
    """Size/quality curve: parameters and encode cost against the mean over the retrieval sets."""
    measured = measured_systems(report)
    if len(measured) < 2:
        return None
    by_size = [_point(name, size.parameters / 1e6, mean) for name, (size, mean) in measured.items()]
    by_cost = [
        _point(name, size.encode_seconds, mean)
        for name, (size, mean) in measured.items()
        if size.encode_seconds is not None
    ]
    quality = "mean nDCG@10"
    charts = [point_chart("Quality by size", "million parameters", quality, by_size)]
    if by_cost:
        charts.append(point_chart("Quality by encode cost", "CPU seconds per 1,000 texts", quality, by_cost))
    said = (
        "Mean nDCG@10 of the retrieval sets with its 95 % interval. A prefix (student@288) has the parameters and the "
        "encode cost of the whole; its index is smaller. ○ baseline, ● teacher, ■ student."
    )
    rows: list[list[Content]] = [
        [system_name(name), with_interval(mean), plain(size.parameters), _megabytes(size.bytes), *_costs(name, size)]
        for name, (size, mean) in sorted(measured.items(), key=lambda item: -item[1][1].value)
    ]
    head = ["system", quality, "parameters", "weights", "numbers per text", "index of a million texts", "encode cost"]
    return section(
        "Size and quality",
        tag("p", said, class_="quiet"),
        tag("div", *charts, class_="charts"),
        table("Quality and what it costs (index in float32; cost in CPU seconds per 1,000 texts)", head, rows),
    )


def measured_systems(report: Report) -> dict[str, tuple[Size, Interval]]:
    """Systems whose size and mean score are known; a prefix has its model's size. BM25 has no parameters."""
    tables = {**report.baselines, **report.scores, **report.other_scores}
    found = {}
    for name in tables:
        size, mean = report.sizes.get(name.partition("@")[0]), report.means.get(name)
        if size is not None and mean is None and (value := mean_retrieval(tables[name])) is not None:
            mean = Interval(value=value, low=value, high=value)
        if size is not None and mean is not None:
            found[name] = (size, mean)
    return found


def _point(system: str, cost: float, mean: Interval) -> Point:
    return Point(short_name(system), kind(system), cost, mean.value, mean.low, mean.high)


def _costs(system: str, size: Size) -> list[Content]:
    prefix = system.partition("@")[2]
    dim = int(prefix) if prefix.isdigit() else size.dim
    index = None if dim is None else _megabytes(4_000_000 * dim)
    return [dim, index, None if size.encode_seconds is None else plain(size.encode_seconds)]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def student_section(report: Report) -> Section | None:
    """Closeness to the teacher before and after, size and encode cost, from `comparison.json`."""
    if report.student is None:
        return None
    cosine, cost = report.student["cosine_to_teacher"], report.student["encode_cost"]
    widths = sorted((key for key, found in cosine["after"].items() if isinstance(found, dict)), key=int, reverse=True)
    near: list[list[Content]] = [
        [f"{width} dims", *(with_interval(cosine[when].get(width)) for when in ("before", "after"))] for width in widths
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
        _sizes(both),
        tag("p", how, class_="quiet"),
    )


def _sizes(rows: list[list[Content]]) -> Markup:
    return table("Size and cost", ["measure", "teacher", "student", "student's share"], rows)


def _side_by_side(label: str, found: Mapping[str, Any]) -> list[Content]:
    return [label, plain(found["teacher"]), plain(found["student"]), f"{100 * found['ratio']:.0f} %"]
