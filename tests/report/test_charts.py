"""Charts, and the template parts of the pages."""

import math
import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from report_kit import drawn, figure

from nvembed.report.charts import (
    WIDTH,
    Chart,
    Dot,
    bar_chart,
    curves_chart,
    dot_chart,
    line_chart,
    point_chart,
    running_mean,
    ticks,
)
from nvembed.report.pages import template_environment
from nvembed.report.words import duration


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    """The corners of a polyline."""
    return [(float(x), float(y)) for x, y in (point.split(",") for point in line.attrib["points"].split())]


ROOT = Path(__file__).resolve().parents[2]
numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(numbers, numbers)
def test_ticks_cover_the_range_with_a_few_round_steps(first: float, second: float) -> None:
    low, high = min(first, second), max(first, second)
    places = ticks(low, high)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert places[0] <= low + slack and places[-1] >= high - slack
    assert 2 <= len(places) <= 9
    assert places == sorted(set(places))


@given(st.lists(numbers, min_size=1, max_size=60))
def test_line_chart_stays_inside_its_box(values: list[float]) -> None:
    svg = drawn(line_chart("loss", "optimiser step", "loss", list(enumerate(values))))
    _, _, width, height = map(int, svg.attrib["viewBox"].split())
    for line in svg.iter("polyline"):
        assert len(points(line)) == len(values)
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points(line))


def test_line_chart_has_labelled_axes_and_leaves_out_what_is_no_number() -> None:
    svg = drawn(line_chart("train: loss", "optimiser step", "loss", [(0, 2.0), (1, math.nan), (2, 1.0)]))
    texts = [text.text for text in svg.iter("text")]
    assert "optimiser step" in texts and "loss" in texts
    assert svg.findtext("title") == "train: loss"
    assert "nan" not in ElementTree.tostring(svg, "unicode")
    assert line_chart("x", "a", "b", [(0.0, math.inf)]) == Chart("x", missing="no finite value")
    assert figure(Chart("x", missing="no finite value")).strip() == "<p>x: no finite value.</p>"


def test_running_mean() -> None:
    assert running_mean([4, 2, 0, 8], 2) == [4, 3, 1, 4]


def test_dot_chart_marks_differ_by_shape() -> None:
    dots = [
        Dot("BM25", "baseline", 0.3, 0.2, 0.4),
        Dot("t", "teacher", 0.6, 0.5, 0.7),
        Dot("s", "student", 0.5, 0.4, 0.6),
    ]
    svg = drawn(dot_chart("cwe", "nDCG@10", dots))
    assert [circle.attrib["class"] for circle in svg.iter("circle")] == ["hollow", "mark"]
    assert len(list(svg.iter("rect"))) == 1
    whiskers = [points(line) for line in svg.iter("polyline") if line.attrib["class"] == "thick"]
    assert len(whiskers) == 3 and all(start[0] < end[0] <= WIDTH for start, end in whiskers)


def test_restarts_are_marked_at_their_steps() -> None:
    svg = drawn(line_chart("t", "optimiser step", "loss", [(0, 3), (1, 2), (2, 1)], [1, 1]))
    assert "restarted at optimiser step 1, 1" in svg.attrib["aria-label"]
    (line,) = [points(line) for line in svg.iter("polyline") if line.attrib["class"] == "mark-line"]
    (curve,) = [points(line) for line in svg.iter("polyline") if line.attrib["class"] == "thick"]
    assert {x for x, _ in line} == {curve[1][0]}


def test_curves_differ_by_style() -> None:
    curves = {"A": [(0.0, 2.0), (1.0, math.nan), (2.0, 1.0)], "B": [(0.0, 3.0)], "C": []}
    svg = drawn(curves_chart("t", "step", "loss", curves))
    styles = [line.attrib["class"] for line in svg.iter("polyline")]
    assert styles == ["thick series0", "thick series1"] and svg.findtext("desc") == "A from 2 to 1; B from 3 to 3"


costs = st.floats(0.01, 1e6)


@given(st.lists(st.tuples(costs, st.floats(0, 1)), min_size=1, max_size=7))
def test_point_chart_keeps_marks_and_names_inside(models: list[tuple[float, float]]) -> None:
    dots = [Dot(f"model {i}", "teacher", y, y - 0.1, y + 0.1, cost=x) for i, (x, y) in enumerate(models)]
    svg = drawn(point_chart("quality", "cost", "nDCG@10", dots))
    *_, width, height = map(int, svg.attrib["viewBox"].split())
    marks = list(svg.iter("circle"))
    assert len(marks) == len(dots)
    assert all(0 <= float(mark.attrib["cx"]) <= width and 0 <= float(mark.attrib["cy"]) <= height for mark in marks)
    assert ("logarithmic" in "".join(svg.itertext())) == (max(models)[0] > 20 * min(models)[0])
    assert all(f"model {i}" in [text.text for text in svg.iter("text")] for i in range(len(dots)))


def test_names_of_near_points_do_not_lie_on_each_other() -> None:
    dots = [Dot(name, "student", 0.5 + i / 500, 0.4, 0.6, cost=5.0 + i / 100) for i, name in enumerate("abcd")]
    svg = drawn(point_chart("quality", "cost", "nDCG@10", dots))
    places = [(text.attrib["x"], float(text.attrib["y"])) for text in svg.iter("text") if text.text in list("abcd")]
    assert len(places) == 4
    assert all(x != other or abs(y - place) >= 13 for i, (x, y) in enumerate(places) for other, place in places[:i])


def test_long_names_have_room() -> None:
    dots = [Dot("student champion@1024", "champion", 0.3, 0.2, 0.4)]
    svg = drawn(dot_chart("cwe", "nDCG@10", dots))
    name = next(text for text in svg.iter("text") if text.text == dots[0].label)
    assert float(name.attrib["x"]) > 6 * len(dots[0].label)
    assert [mark.attrib["class"] for mark in svg.iter("polygon")] == ["mark"]


def test_bar_chart_shows_only_the_used_part() -> None:
    edges = [-1.0, -0.5, 0.0, 0.5, 1.0]
    series = {"positives": [0, 0, 1, 3], "negatives": [0, 0, 4, 0]}
    svg = drawn(bar_chart("scores", "similarity", edges, series))
    assert len(list(svg.iter("polyline"))) == 2
    labels = [text.text for text in svg.iter("text")]
    assert "-0.5" not in labels and "negatives" in labels
    assert bar_chart("scores", "x", edges, {"positives": [0, 0, 0, 0]}).missing == "no scores"


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))))
def test_templates_escape_text_and_attributes(text: str) -> None:
    element = ElementTree.fromstring(figure(line_chart(text, text, text, [(0, 1)])))
    assert (element.findtext("figcaption") or "") == text
    label = element.find("svg").attrib["aria-label"]  # type: ignore[union-attr]
    assert re.sub(r"[\t\n\r]", " ", label) == re.sub(r"[\t\n\r]", " ", f"{text}: {text} from 1 to 1")


def test_parts_are_escaped_once() -> None:
    parts = template_environment().get_template("parts.html").make_module({"sections": {}})
    assert parts.noted("a & b", parts.noted("<", None)) == "a &amp; b<small>&lt;</small>"
    table = template_environment().from_string(
        '{% from "parts.html" import row, table with context %}'
        '{% call table("<caption>", ["a", ("b", "note")]) %}{{ row("x", [none]) }}{% endcall %}'
    )
    box = ElementTree.fromstring(table.render(sections={}))
    assert box.attrib["aria-label"] == "<caption>" and box.findtext(".//thead//small") == "note"
    assert box.findtext(".//td") == "–"
    assert box.find(".//tbody/tr/th").attrib["scope"] == "row"  # type: ignore[union-attr]


def test_an_unknown_name_in_a_template_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        template_environment().from_string("{{ nothing }}").render()


def test_the_package_carries_the_templates() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["nvembed"]
    package = ROOT / "nvembed"
    carried = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in (package / "report/templates").iterdir() if path.is_file()}
    assert len(files) == 6 and files <= carried


@pytest.mark.parametrize(
    ("seconds", "text"), [(48.06, "48.1 s"), (60, "1 min 0 s"), (725, "12 min 5 s"), (12_000, "3 h 20 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
