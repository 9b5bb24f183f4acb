"""Charts as inline SVG written by hand: no ids that could collide, colours from the page's style, light or dark.

The drawing is 380 units wide, so that its letters stay readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nvembed.report.markup import Markup, join, tag

WIDTH = 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 40


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from at or below `low` to at or above `high`."""
    least = 1e-6 * max(abs(low), abs(high), 1e-3)  # equal values still get an axis
    if high - low < least:
        low, high = low - least / 2, high + least / 2
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """A tick's label."""
    return f"{value:.6g}"


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place (fewer at the start)."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def line_chart(title: str, x_label: str, y_label: str, xs: Sequence[float], ys: Sequence[float]) -> Markup:
    """One curve: each value thin, and where there are enough of them a running mean thick."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    if not points:
        return tag("p", f"{title}: no finite value.")
    height = 230
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), height - _BOTTOM - up * (height - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_number(y), y2=_number(y), class_="grid"))
        parts.append(tag("text", short(tick), x=_LEFT - 6, y=_number(y + 4), class_="end"))
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(tag("text", short(tick), x=_number(x), y=height - _BOTTOM + 16, class_="middle"))
    parts.append(tag("text", x_label, x=(WIDTH + _LEFT) // 2, y=height - 6, class_="middle"))
    turned = f"rotate(-90 12 {height // 2 - 10})"
    parts.append(tag("text", y_label, x=12, y=height // 2 - 10, class_="middle", transform=turned))
    window = len(points) // 15
    parts.append(_polyline([place(x, y) for x, y in points], "thin" if window > 1 else "thick"))
    if window > 1:
        means = running_mean([y for _, y in points], window)
        parts.append(_polyline([place(x, y) for (x, _), y in zip(points, means, strict=True)], "thick"))
        parts.append(tag("text", f"thick: mean of {window} steps", x=WIDTH - _RIGHT, y=_TOP + 2, class_="end"))
    return _figure(title, f"{y_label} from {points[0][1]:.4g} to {points[-1][1]:.4g}", height, parts)


def bar_chart(
    title: str, x_label: str, y_label: str, edges: Sequence[float], series: dict[str, Sequence[int]]
) -> Markup:
    """Histograms over the same edges as outlines, each scaled to its own total; named by line style in the legend."""
    used = [i for i in range(len(edges) - 1) if any(counts[i] for counts in series.values())]
    if not used:
        return tag("p", f"{title}: no scores.")
    first, last = used[0], used[-1] + 1
    height = 230
    shares = {name: [n / (sum(counts) or 1) for n in counts[first:last]] for name, counts in series.items()}
    y_ticks = ticks(0.0, max(max(values) for values in shares.values()), 4)
    x_ticks = [tick for tick in ticks(edges[first], edges[last]) if edges[first] - 1e-9 <= tick <= edges[last] + 1e-9]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - edges[first]) / (edges[last] - edges[first])
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            height - _BOTTOM - y / y_ticks[-1] * (height - _TOP - _BOTTOM),
        )

    parts = []
    for tick in y_ticks:
        _, y = place(edges[first], tick)
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_number(y), y2=_number(y), class_="grid"))
        parts.append(tag("text", f"{100 * tick:.3g} %", x=_LEFT - 4, y=_number(y + 4), class_="end"))
    for tick in x_ticks:
        parts.append(tag("text", short(tick), x=_number(place(tick, 0)[0]), y=height - _BOTTOM + 16, class_="middle"))
    parts.append(tag("text", x_label, x=(WIDTH + _LEFT) // 2, y=height - 6, class_="middle"))
    for number, (name, values) in enumerate(shares.items()):
        outline = [place(edges[first], 0.0)]
        for i, value in enumerate(values):
            outline += [place(edges[first + i], value), place(edges[first + i + 1], value)]
        outline.append(place(edges[last], 0.0))
        parts.append(_polyline(outline, f"thick series{number}"))
        y = _TOP + 4 + 15 * number
        parts.append(tag("line", x1=_LEFT + 6, x2=_LEFT + 30, y1=y, y2=y, class_=f"thick series{number}"))
        parts.append(tag("text", name, x=_LEFT + 35, y=y + 4))
    return _figure(title, f"{y_label}: {', '.join(shares)}", height, parts)


@dataclass(frozen=True)
class Dot:
    """A row of `dot_chart`: a value with its interval; `kind` is "baseline", "teacher" or "student" (the mark)."""

    label: str
    kind: str
    value: float
    low: float
    high: float


def dot_chart(title: str, x_label: str, dots: Sequence[Dot]) -> Markup:
    """Values with intervals, one row each; circles are baselines, filled circles teachers, squares students."""
    shown = [dot for dot in dots if all(map(math.isfinite, (dot.value, dot.low, dot.high)))]
    if not shown:
        return tag("p", f"{title}: no finite value.")
    left, row = 96, 24
    height = _TOP + row * len(shown) + _BOTTOM
    x_ticks = ticks(min(0.0, *(dot.low for dot in shown)), max(dot.high for dot in shown))

    def place(x: float) -> float:
        return left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - left - 16)

    parts = []
    for tick in x_ticks:
        at = _number(place(tick))
        parts.append(tag("line", x1=at, x2=at, y1=_TOP, y2=height - _BOTTOM, class_="grid"))
        parts.append(tag("text", short(tick), x=at, y=height - _BOTTOM + 16, class_="middle"))
    parts.append(tag("text", x_label, x=(WIDTH + left) // 2, y=height - 6, class_="middle"))
    for number, dot in enumerate(shown):
        y = _TOP + row * number + row // 2
        x = place(dot.value)
        parts.append(tag("text", dot.label, x=left - 8, y=y + 4, class_="end"))
        parts.append(tag("line", x1=_number(place(dot.low)), x2=_number(place(dot.high)), y1=y, y2=y, class_="thick"))
        if dot.kind == "student":
            parts.append(tag("rect", x=_number(x - 5), y=y - 5, width=10, height=10, class_="mark"))
        else:
            parts.append(tag("circle", cx=_number(x), cy=y, r=5, class_="mark" if dot.kind == "teacher" else "hollow"))
    said = "; ".join(f"{dot.label} {dot.value:.3f}" for dot in shown)
    return _figure(title, said, height, parts)


def _polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    return tag("polyline", points=" ".join(f"{_number(x)},{_number(y)}" for x, y in points), class_=class_)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _figure(title: str, description: str, height: int, parts: Sequence[Markup]) -> Markup:
    svg = tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        join(parts),
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=f"{title}: {description}",
    )
    return tag("figure", tag("figcaption", title), svg)
