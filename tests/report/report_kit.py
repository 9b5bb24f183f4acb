"""Helpers of the report tests: reads pages, charts and reports."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from nvembed.report.charts import Chart
from nvembed.report.pages import template_environment, write_report

RECIPE = {"name": "quickstart", "evaluate": {"bootstrap_samples": 200, "seed": 17}}
VOID = {"meta", "line", "circle", "rect", "polyline", "polygon"}


class Page(HTMLParser):
    """Checks the nesting of a page and collects its tags and texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def figure(chart: Chart) -> str:
    """A chart with its title, as the page has it."""
    return str(template_environment().get_template("chart.html").make_module().figure(chart))  # type: ignore[attr-defined]


def drawn(chart: Chart) -> ElementTree.Element:
    """A chart's SVG as the page has it."""
    svg = ElementTree.fromstring(figure(chart)).find("svg")
    assert svg is not None
    return svg


def raw(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def write_run(out: Path, make_run: Callable[..., Any], recipe: dict[str, Any] = RECIPE, **options: Any) -> Path:
    """The report of a hand-made output."""
    run = make_run(str(out), **options)
    uri = write_report(str(out), recipe["name"], recipe, run.records, run.artifacts, 1043.2, 5230.0)
    assert uri == str(out / "report.html")
    return out
