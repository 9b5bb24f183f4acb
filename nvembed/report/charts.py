"""Charts as inline SVG written by hand: no ids that could collide, colours from the page's style, light or dark.

The drawing is 380 units wide, so that its letters stay readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvembed.report.markup import Markup, join, tag

WIDTH = 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 40


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


@dataclass(frozen=True)
class Frame:
    """The box between two axes: round ticks on both, values to places on the page."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    height: int = 230
    log: bool = False

    def x(self, value: float) -> float:
        """Place of a value of the horizontal axis."""
        low, high, at = self.x_ticks[0], self.x_ticks[-1], value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return _LEFT + (at - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Place of a value of the vertical axis."""
        up = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return self.height - _BOTTOM - up * (self.height - _TOP - _BOTTOM)

    def axes(self, x_label: str, y_label: str) -> list[Markup]:
        """Grid, tick labels and names of the axes."""
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_number(y), y2=_number(y), class_="grid"))
            parts.append(tag("text", short(tick), x=_LEFT - 6, y=_number(y + 4), class_="end"))
        for tick in self.x_ticks:
            place, bottom = _number(self.x(tick)), self.height - _BOTTOM
            parts.append(tag("text", short(tick), x=place, y=bottom + 16, class_="middle"))
        parts.append(tag("text", x_label, x=(WIDTH + _LEFT) // 2, y=self.height - 6, class_="middle"))
        turned = f"rotate(-90 12 {self.height // 2 - 10})"
        parts.append(tag("text", y_label, x=12, y=self.height // 2 - 10, class_="middle", transform=turned))
        return parts


Curve = Sequence[tuple[float, float]]


def line_chart(
    title: str, x_label: str, y_label: str, xs: Sequence[float], ys: Sequence[float], marks: Sequence[float] = ()
) -> Markup:
    """One curve: each value thin, and where there are enough of them a running mean thick.

    Args:
        marks: places on the horizontal axis where the run was restarted.
    """
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    if not points:
        return tag("p", f"{title}: no finite value.")
    frame = _frame([points], marks)
    parts = frame.axes(x_label, y_label)
    for mark in sorted(set(marks)):
        x = frame.x(mark)
        top, bottom = _TOP + 8, frame.height - _BOTTOM
        parts.append(tag("line", x1=_number(x), x2=_number(x), y1=top, y2=bottom, class_="mark-line"))
        corners = [(x - 5, top - 8), (x + 5, top - 8), (x, top)]
        parts.append(tag("polygon", points=_places(corners), class_="mark-head"))
    window = len(points) // 15
    parts.append(_drawn(frame, points, "thin" if window > 1 else "thick"))
    if window > 1:
        means = running_mean([y for _, y in points], window)
        parts.append(_drawn(frame, [(x, y) for (x, _), y in zip(points, means, strict=True)], "thick"))
        parts.append(tag("text", f"thick: mean of {window} steps", x=WIDTH - _RIGHT, y=_TOP + 2, class_="end"))
    said = f"{y_label} from {points[0][1]:.4g} to {points[-1][1]:.4g}"
    if marks:
        said += f"; restarted at {x_label} {', '.join(short(mark) for mark in marks)}"
    return _figure(title, said, frame.height, parts)


def curves_chart(title: str, x_label: str, y_label: str, curves: Mapping[str, Curve]) -> Markup:
    """Several curves over each other, told apart by line style; long ones as a running mean."""
    finite = {name: [(x, y) for x, y in curve if math.isfinite(y)] for name, curve in curves.items()}
    shown = {name: curve for name, curve in finite.items() if curve}
    if not shown:
        return tag("p", f"{title}: no finite value.")
    windows = {name: max(1, len(curve) // 15) for name, curve in shown.items()}
    smooth = {
        name: list(zip((x for x, _ in curve), running_mean([y for _, y in curve], windows[name]), strict=True))
        for name, curve in shown.items()
    }
    frame = _frame(list(smooth.values()), (), legend=len(shown))
    parts = frame.axes(x_label, y_label)
    for number, (name, curve) in enumerate(smooth.items()):
        parts.append(_drawn(frame, curve, f"thick series{number}"))
        note = f" (mean of {windows[name]} steps)" if windows[name] > 1 else ""
        parts += _legend(number, f"{name}{note}", right=True)
    said = "; ".join(f"{name} from {curve[0][1]:.4g} to {curve[-1][1]:.4g}" for name, curve in shown.items())
    return _figure(title, said, frame.height, parts)


def _frame(curves: Sequence[Curve], marks: Sequence[float], legend: int = 0) -> Frame:
    """A frame around curves and marks, with room for a legend of so many lines at the top."""
    xs = [x for curve in curves for x, _ in curve] + list(marks)
    ys = [y for curve in curves for _, y in curve]
    room = (max(ys) - min(ys)) * 0.09 * legend
    return Frame(ticks(min(xs), max(xs)), ticks(min(ys), max(ys) + room))


def _drawn(frame: Frame, curve: Curve, class_: str) -> Markup:
    return tag("polyline", points=_places([(frame.x(x), frame.y(y)) for x, y in curve]), class_=class_)


def _legend(number: int, name: str, *, right: bool = False) -> list[Markup]:
    """Line style and name of a series, one line each from the top left or the top right."""
    y, x = _TOP + 4 + 15 * number, WIDTH - _RIGHT - 28 if right else _LEFT + 6
    line = tag("line", x1=x, x2=x + 24, y1=y, y2=y, class_=f"thick series{number}")
    place: dict[str, str | int] = {"x": x - 5, "class_": "end"} if right else {"x": x + 29}
    return [line, tag("text", name, y=y + 4, **place)]


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
    most = max(max(values) for values in shares.values())
    y_ticks = ticks(0.0, most * (1 + 0.09 * len(shares)), 4)  # the legend stands above
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
        parts.append(tag("polyline", points=_places(outline), class_=f"thick series{number}"))
        parts += _legend(number, name)
    return _figure(title, f"{y_label}: {', '.join(shares)}", height, parts)


@dataclass(frozen=True)
class Dot:
    """A row of `dot_chart`: a value with its interval.

    `kind` decides the mark: "baseline", "champion", "teacher" or "student".
    """

    label: str
    kind: str
    value: float
    low: float
    high: float


def dot_chart(title: str, x_label: str, dots: Sequence[Dot]) -> Markup:
    """Values with intervals, one row each."""
    shown = [dot for dot in dots if all(map(math.isfinite, (dot.value, dot.low, dot.high)))]
    if not shown:
        return tag("p", f"{title}: no finite value.")
    left, row = max(96, *(round(6.6 * len(dot.label)) + 14 for dot in shown)), 24
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
        parts.append(_mark(dot.kind, x, y))
    said = "; ".join(f"{dot.label} {dot.value:.3f}" for dot in shown)
    return _figure(title, said, height, parts)


@dataclass(frozen=True)
class Point:
    """A model in `point_chart`; `kind` as in `Dot`."""

    label: str
    kind: str
    x: float
    y: float
    low: float
    high: float


def point_chart(title: str, x_label: str, y_label: str, points: Sequence[Point]) -> Markup:
    """Models by what they cost (horizontal) and how good they are (vertical, with intervals), each with its name.

    The horizontal axis starts at 0; where costs differ more than twentyfold it is logarithmic.
    """
    shown = [point for point in points if point.x > 0 and all(map(math.isfinite, (point.x, point.y)))]
    if not shown:
        return tag("p", f"{title}: no finite value.")
    low, high = min(point.x for point in shown), max(point.x for point in shown)
    log = high > 20 * low
    x_ticks = _powers(low, high) if log else ticks(0.0, high * 1.1)
    y_ticks = ticks(min(0.0, *(point.low for point in shown)), max(point.high for point in shown))
    frame = Frame(x_ticks, y_ticks, height=290, log=log)
    parts = frame.axes(f"{x_label}{' (logarithmic)' if log else ''}", y_label)
    places = [(frame.x(point.x), frame.y(point.y)) for point in shown]
    for point, (x, y) in zip(shown, places, strict=True):
        ends = [_number(frame.y(end)) for end in (point.low, point.high)]
        parts.append(tag("line", x1=_number(x), x2=_number(x), y1=ends[0], y2=ends[1], class_="thick faint"))
        parts.append(_mark(point.kind, x, y))
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    for point, place in sorted(zip(shown, places, strict=True), key=lambda item: item[1][1]):
        box, right = _free_box(point.label, place, taken, frame.height - _BOTTOM)
        taken.append(box)
        at = {"x": _number(box[0])} if right else {"x": _number(box[2]), "class_": "end"}
        parts.append(tag("text", point.label, y=_number(box[3] - 3), **at))
    said = "; ".join(f"{point.label}: {short(point.x)}, {point.y:.3f}" for point in shown)
    return _figure(title, said, frame.height, parts)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _free_box(text: str, place: tuple[float, float], taken: Sequence[Box], bottom: float) -> tuple[Box, bool]:
    """Where a mark's name hides neither a mark nor another name, as near as possible; whether it is on the right."""
    wide, high = 6.4 * len(text), 13.0
    x, y = place
    for shift in sorted(range(-60, 61, 3), key=abs):
        for right in (True, False):
            left = x + 9 if right else x - 9 - wide
            box = (left, y - high / 2 + shift, left + wide, y + high / 2 + shift)
            inside = left >= _LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= bottom
            if inside and not any(_overlap(box, other) for other in taken):
                return box, right
    return (x + 9, y - high / 2, x + 9 + wide, y + high / 2), True


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten around a range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _mark(kind: str, x: float, y: float) -> Markup:
    """Squares are students, filled circles teachers, diamonds champions, circles everything else."""
    if kind == "champion":
        return tag("polygon", points=_places([(x - 6, y), (x, y - 6), (x + 6, y), (x, y + 6)]), class_="mark")
    if kind == "student":
        return tag("rect", x=_number(x - 5), y=_number(y - 5), width=10, height=10, class_="mark")
    return tag("circle", cx=_number(x), cy=_number(y), r=5, class_="mark" if kind == "teacher" else "hollow")


def _places(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in points)


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
