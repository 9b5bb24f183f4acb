"""The drawings and the markup under the page."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.report.charts import WIDTH, Dot, bar_chart, dot_chart, line_chart, running_mean, ticks
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
