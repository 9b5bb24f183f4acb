"""Charts as data: axes, curves, marks and texts placed on a drawing; `templates/chart.html` turns them into SVG.

A drawing is 380 units wide, so that its letters stay readable on a phone. Colours and line styles come from the page's
style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

WIDTH = 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 40

XY = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Axis:
    """Places values on the drawing: the first tick at `start`, the last at `end`."""

    label: str
    ticks: Sequence[float]
    start: float
    end: float
    log: bool = False
    percent: bool = False

    def place(self, value: float) -> float:
        """The place of a value."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def tick_label(self, tick: float) -> str:
        """The text beside a tick."""
        return f"{100 * tick:.3g} %" if self.percent else f"{tick:.6g}"


class Line(NamedTuple):
    """A straight or broken line; `style` is a class of the style sheet."""

    points: Sequence[XY]
    style: str


class Mark(NamedTuple):
    """A symbol: "baseline", "teacher", "student" or "champion" around a point, "restart" above it."""

    kind: str
    x: float
    y: float


class Text(NamedTuple):
    """A text that starts at a point, or ends there (style "end")."""

    text: str
    x: float
    y: float
    style: str = ""


class Dot(NamedTuple):
    """A model: its score with the interval, and its cost where a chart shows costs; `kind` as in `Mark`."""

    label: str
    kind: str
    value: float
    low: float
    high: float
    cost: float = 0.0


@dataclass
class Chart:
    """A drawing."""

    title: str
    x: Axis | None = None  # None where there is nothing to draw
    y: Axis | None = None  # None where each row has a name instead
    height: int = 230
    description: str = ""  # the content in words, for readers who cannot see the drawing
    missing: str = "no finite value"  # why there is nothing to draw
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    legend: list[str] = field(default_factory=list)  # names of the series, in the order of their line styles
    legend_right: bool = True
    top: int = _TOP

    @property
    def bottom(self) -> int:
        """Where the horizontal axis lies."""
        return self.height - _BOTTOM

    def line(self, points: Sequence[XY], style: str) -> None:
        """Draw a line through values."""
        assert self.x is not None and self.y is not None
        self.lines.append(Line([(self.x.place(x), self.y.place(y)) for x, y in points], style))


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


def _axes(
    labels: tuple[str, str], curves: Sequence[Sequence[XY]], marks: Sequence[float] = (), legend: int = 0
) -> tuple[Axis, Axis]:
    """Axes around curves and marks on the horizontal axis, with room at the top for a legend of `legend` lines."""
    xs = [x for curve in curves for x, _ in curve] + list(marks)
    ys = [y for curve in curves for _, y in curve]
    room = (max(ys) - min(ys)) * 0.09 * legend
    x_axis = Axis(labels[0], ticks(min(xs), max(xs)), _LEFT, WIDTH - _RIGHT)
    return x_axis, Axis(labels[1], ticks(min(ys), max(ys) + room), Chart.height - _BOTTOM, _TOP)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place (fewer at the start)."""
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]


class _Curve:
    """The finite values of a curve, and their running mean where there are many."""

    def __init__(self, points: Sequence[XY]) -> None:
        self.points = [(x, y) for x, y in points if math.isfinite(y)]
        self.window = max(1, len(self.points) // 15)
        means = running_mean([y for _, y in self.points], self.window)
        self.smooth = [(x, mean) for (x, _), mean in zip(self.points, means, strict=True)]

    def ends(self, name: str) -> str:
        """Its first and last value in words."""
        return f"{name} from {self.points[0][1]:.4g} to {self.points[-1][1]:.4g}"


def line_chart(title: str, x_label: str, y_label: str, points: Sequence[XY], restarts: Sequence[float] = ()) -> Chart:
    """One curve: its values as a thin line and, where there are many, their running mean as a thick one.

    Args:
        points: places on the horizontal axis and values; values that are no numbers are left out.
        restarts: places on the horizontal axis where the run was restarted.
    """
    curve = _Curve(points)
    if not curve.points:
        return Chart(title)
    x_axis, y_axis = _axes((x_label, y_label), [curve.points], restarts)
    chart = Chart(title, x_axis, y_axis, description=curve.ends(y_label))
    for place in map(x_axis.place, sorted(set(restarts))):
        chart.lines.append(Line([(place, _TOP + 8), (place, y_axis.start)], "mark-line"))
        chart.marks.append(Mark("restart", place, _TOP + 8))
    if curve.window > 1:
        chart.line(curve.points, "thin")
        chart.texts.append(Text(f"thick: mean of {curve.window} steps", WIDTH - _RIGHT, _TOP + 2, "end"))
    chart.line(curve.smooth, "thick")
    if restarts:
        chart.description += f"; restarted at {x_label} {', '.join(map(x_axis.tick_label, restarts))}"
    return chart


def curves_chart(title: str, x_label: str, y_label: str, curves: Mapping[str, Sequence[XY]]) -> Chart:
    """Several curves over each other, distinguished by line style; long ones as a running mean."""
    shown = {name: curve for name, points in curves.items() if (curve := _Curve(points)).points}
    if not shown:
        return Chart(title)
    smooth = [curve.smooth for curve in shown.values()]
    chart = Chart(title, *_axes((x_label, y_label), smooth, legend=len(smooth)))
    for number, (name, curve) in enumerate(shown.items()):
        chart.line(curve.smooth, f"thick series{number}")
        chart.legend.append(name + (f" (mean of {curve.window} steps)" if curve.window > 1 else ""))
    chart.description = "; ".join(curve.ends(name) for name, curve in shown.items())
    return chart


def bar_chart(title: str, x_label: str, edges: Sequence[float], series: Mapping[str, Sequence[int]]) -> Chart:
    """Histograms over the same bins as outlines, each scaled to its own total; distinguished by line style."""
    used = [i for i in range(len(edges) - 1) if any(counts[i] for counts in series.values())]
    if not used:
        return Chart(title, missing="no scores")
    outlines = []
    for counts in series.values():
        shares = [counts[i] / (sum(counts) or 1) for i in range(used[0], used[-1] + 1)]
        corners = [(edges[used[0] + i + end], share) for i, share in enumerate(shares) for end in (0, 1)]
        outlines.append([(corners[0][0], 0.0), *corners, (corners[-1][0], 0.0)])
    x_axis, y_axis = _axes((x_label, ""), outlines, legend=len(outlines))
    chart = Chart(title, x_axis, replace(y_axis, percent=True), legend=list(series), legend_right=False)
    for number, outline in enumerate(outlines):
        chart.line(outline, f"thick series{number}")
    chart.description = f"share: {', '.join(series)}"
    return chart


def dot_chart(title: str, x_label: str, dots: Sequence[Dot]) -> Chart:
    """Scores with intervals, one row each."""
    if not dots:
        return Chart(title)
    left, row = max(96, *(round(6.6 * len(dot.label)) + 14 for dot in dots)), 24
    x_axis = Axis(x_label, _score_ticks(dots), left, WIDTH - 16)
    chart = Chart(title, x_axis, height=_TOP + row * len(dots) + _BOTTOM)
    for number, dot in enumerate(dots):
        y = _TOP + row * number + row // 2
        chart.texts.append(Text(dot.label, left - 8, y + 4, "end"))
        chart.lines.append(Line([(x_axis.place(end), y) for end in (dot.low, dot.high)], "thick"))
        chart.marks.append(Mark(dot.kind, x_axis.place(dot.value), y))
    chart.description = "; ".join(f"{dot.label} {dot.value:.3f}" for dot in dots)
    return chart


def _score_ticks(dots: Sequence[Dot]) -> list[float]:
    return ticks(min(0.0, *(dot.low for dot in dots)), max(dot.high for dot in dots))


def point_chart(title: str, x_label: str, y_label: str, dots: Sequence[Dot]) -> Chart:
    """Models by cost (horizontal) and score (vertical, with intervals), each with its name.

    The horizontal axis starts at 0; where costs differ more than twentyfold it is logarithmic.
    """
    shown = [dot for dot in dots if dot.cost > 0]
    if not shown:
        return Chart(title)
    low, high, height = min(dot.cost for dot in shown), max(dot.cost for dot in shown), 290
    log = high > 20 * low
    costs = _powers(low, high) if log else ticks(0.0, high * 1.1)
    x_axis = Axis(f"{x_label}{' (logarithmic)' if log else ''}", costs, _LEFT, WIDTH - _RIGHT, log)
    y_axis = Axis(y_label, _score_ticks(shown), height - _BOTTOM, _TOP)
    chart = Chart(title, x_axis, y_axis, height)
    chart.marks = [Mark(dot.kind, x_axis.place(dot.cost), y_axis.place(dot.value)) for dot in shown]
    taken: list[Box] = [(mark.x - 7, mark.y - 7, mark.x + 7, mark.y + 7) for mark in chart.marks]
    for dot, mark in sorted(zip(shown, chart.marks, strict=True), key=lambda pair: pair[1].y):
        chart.line([(dot.cost, dot.low), (dot.cost, dot.high)], "thick faint")
        box, right = _free_box(dot.label, mark, taken, y_axis.start)
        taken.append(box)
        chart.texts.append(Text(dot.label, box[0] if right else box[2], box[3] - 3, "" if right else "end"))
    chart.description = "; ".join(f"{dot.label}: {dot.cost:.6g}, {dot.value:.3f}" for dot in shown)
    return chart


def _free_box(text: str, mark: Mark, taken: Sequence[Box], bottom: float) -> tuple[Box, bool]:
    """Where a mark's name hides neither a mark nor another name, as near as possible; whether it is on the right."""
    wide, high = 6.4 * len(text), 13.0
    for shift in sorted(range(-60, 61, 3), key=abs):
        for right in (True, False):
            left = mark.x + 9 if right else mark.x - 9 - wide
            box = (left, mark.y - high / 2 + shift, left + wide, mark.y + high / 2 + shift)
            inside = left >= _LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= bottom
            if inside and not any(a[0] < box[2] and box[0] < a[2] and a[1] < box[3] and box[1] < a[3] for a in taken):
                return box, right
    return (mark.x + 9, mark.y - high / 2, mark.x + 9 + wide, mark.y + high / 2), True


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten around a range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]
