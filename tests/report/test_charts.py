"""The drawings and the markup under the page."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.report.charts import (
    WIDTH,
    Dot,
    Point,
    bar_chart,
    curves_chart,
    dot_chart,
    line_chart,
    point_chart,
    running_mean,
    ticks,
)
from nvembed.report.markup import Markup, join, table, tag
from nvembed.report.words import duration

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(numbers, numbers)
def test_ticks_cover_the_range_with_a_few_round_steps(first: float, second: float) -> None:
    low, high = min(first, second), max(first, second)
    found = ticks(low, high)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert found[0] <= low + slack and found[-1] >= high - slack
    assert 2 <= len(found) <= 9
    assert found == sorted(set(found))


@given(st.lists(numbers, min_size=1, max_size=60))
def test_line_chart_stays_inside_its_box(values: list[float]) -> None:
    svg = ElementTree.fromstring(line_chart("loss", "optimiser step", "loss", range(len(values)), values)).find("svg")
    assert svg is not None
    _, _, width, height = map(int, svg.attrib["viewBox"].split())
    for line in svg.iter("polyline"):
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert len(points) == len(values)
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_line_chart_has_labelled_axes_and_leaves_out_what_is_no_number() -> None:
    chart = line_chart("train: loss", "optimiser step", "loss", [0, 1, 2], [2.0, math.nan, 1.0])
    svg = ElementTree.fromstring(chart).find("svg")
    assert svg is not None
    texts = [text.text for text in svg.iter("text")]
    assert "optimiser step" in texts and "loss" in texts
    assert svg.findtext("title") == "train: loss"
    assert "nan" not in chart
    assert "no finite value" in line_chart("x", "a", "b", [0.0], [math.inf])


def test_running_mean() -> None:
    assert running_mean([4, 2, 0, 8], 2) == [4, 3, 1, 4]


def test_dot_chart_marks_differ_by_shape() -> None:
    dots = [
        Dot("BM25", "baseline", 0.3, 0.2, 0.4),
        Dot("t", "teacher", 0.6, 0.5, 0.7),
        Dot("s", "student", 0.5, 0.4, 0.6),
    ]
    svg = ElementTree.fromstring(dot_chart("cwe", "nDCG@10", dots)).find("svg")
    assert svg is not None
    assert [circle.attrib["class"] for circle in svg.iter("circle")] == ["hollow", "mark"]
    assert len(list(svg.iter("rect"))) == 1
    whiskers = [line for line in svg.iter("line") if line.attrib["class"] == "thick"]
    assert all(float(line.attrib["x1"]) < float(line.attrib["x2"]) <= WIDTH for line in whiskers)


def test_restarts_are_marked_at_their_steps() -> None:
    svg = ElementTree.fromstring(line_chart("t", "optimiser step", "loss", [0, 1, 2], [3, 2, 1], [1, 1])).find("svg")
    assert svg is not None and "restarted at optimiser step 1, 1" in svg.attrib["aria-label"]
    lines = [line for line in svg.iter("line") if line.attrib["class"] == "mark-line"]
    curve = next(svg.iter("polyline")).attrib["points"].split()
    assert [line.attrib["x1"] for line in lines] == [curve[1].split(",")[0]]


def test_curves_are_told_apart_by_style() -> None:
    chart = curves_chart("t", "step", "loss", {"A": [(0, 2), (1, math.nan), (2, 1)], "B": [(0, 3)], "C": []})
    svg = ElementTree.fromstring(chart).find("svg")
    assert svg is not None
    drawn = [line.attrib["class"] for line in svg.iter("polyline")]
    assert drawn == ["thick series0", "thick series1"] and svg.findtext("desc") == "A from 2 to 1; B from 3 to 3"


costs = st.floats(0.01, 1e6)


@given(st.lists(st.tuples(costs, st.floats(0, 1)), min_size=1, max_size=7))
def test_point_chart_keeps_marks_and_names_inside(found: list[tuple[float, float]]) -> None:
    points = [Point(f"model {i}", "teacher", x, y, y - 0.1, y + 0.1) for i, (x, y) in enumerate(found)]
    svg = ElementTree.fromstring(point_chart("quality", "cost", "nDCG@10", points)).find("svg")
    assert svg is not None
    *_, width, height = map(int, svg.attrib["viewBox"].split())
    marks = list(svg.iter("circle"))
    assert len(marks) == len(points)
    assert all(0 <= float(mark.attrib["cx"]) <= width and 0 <= float(mark.attrib["cy"]) <= height for mark in marks)
    assert ("logarithmic" in "".join(svg.itertext())) == (max(found)[0] > 20 * min(found)[0])
    assert all(f"model {i}" in [text.text for text in svg.iter("text")] for i in range(len(points)))


def test_names_of_near_points_do_not_lie_on_each_other() -> None:
    points = [Point(name, "student", 5.0 + i / 100, 0.5 + i / 500, 0.4, 0.6) for i, name in enumerate("abcd")]
    svg = ElementTree.fromstring(point_chart("quality", "cost", "nDCG@10", points)).find("svg")
    assert svg is not None
    places = [(text.attrib["x"], float(text.attrib["y"])) for text in svg.iter("text") if text.text in list("abcd")]
    assert len(places) == 4
    assert all(x != other or abs(y - place) >= 13 for i, (x, y) in enumerate(places) for other, place in places[:i])


def test_long_names_have_room() -> None:
    dots = [Dot("student champion@1024", "champion", 0.3, 0.2, 0.4)]
    svg = ElementTree.fromstring(dot_chart("cwe", "nDCG@10", dots)).find("svg")
    assert svg is not None
    name = next(text for text in svg.iter("text") if text.text == dots[0].label)
    assert float(name.attrib["x"]) > 6 * len(dots[0].label)
    assert [mark.attrib["class"] for mark in svg.iter("polygon")] == ["mark"]


def test_bar_chart_shows_only_the_used_part() -> None:
    edges = [-1.0, -0.5, 0.0, 0.5, 1.0]
    series = {"positives": [0, 0, 1, 3], "negatives": [0, 0, 4, 0]}
    svg = ElementTree.fromstring(bar_chart("scores", "similarity", "share", edges, series)).find("svg")
    assert svg is not None
    assert len(list(svg.iter("polyline"))) == 2
    labels = [text.text for text in svg.iter("text")]
    assert "-0.5" not in labels and "negatives" in labels
    assert "no scores" in bar_chart("scores", "x", "y", edges, {"positives": [0, 0, 0, 0]})


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))))
def test_markup_escapes_text_and_attributes(text: str) -> None:
    element = ElementTree.fromstring(tag("p", text, title=text))
    assert (element.text or "") == text
    assert re.sub(r"[\t\n\r]", " ", element.attrib["title"]) == re.sub(r"[\t\n\r]", " ", text)


def test_markup_is_escaped_once() -> None:
    assert tag("p", tag("b", "a & b"), " <", None) == "<p><b>a &amp; b</b> &lt;</p>"
    assert join(["<", Markup("<br/>")]) == "&lt;<br/>"
    found = ElementTree.fromstring(table("caption", ["a", "b"], [["x", None]]))
    assert found.findtext(".//td") == "–"
    assert found.find(".//tbody/tr/th").attrib["scope"] == "row"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("seconds", "said"), [(48.06, "48.1 s"), (60, "1 min 0 s"), (725, "12 min 5 s"), (12_000, "3 h 20 min")]
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said
