"""Writes `report.json` and `report.html` of a run, and renders the page that compares runs.

The pages are Jinja2 templates; every value is HTML-escaped. A page is one self-contained file without
scripts; it reads on a phone, in dark mode and on paper.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nvembed.core import storage
from nvembed.core.steps import REPORT_HTML
from nvembed.evaluation.significance import MEAN
from nvembed.report.collect import collect_report
from nvembed.report.compare import RunComparison
from nvembed.report.content import Curves, by_pair, comparison_content, run_content
from nvembed.report.runs import REPORT_JSON, Run, read_curves
from nvembed.report.schema import Report
from nvembed.report.words import FILTERS
from nvembed.types import Artifact

GENERATOR = "nvembed report"  # the page's generator; files without it are never replaced


def write_report(
    out: str,
    recipe_name: str,
    recipe: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    artifacts: Mapping[str, Artifact],
    wall_seconds: float,
    peak_pss_mb: float | None,
) -> str:
    """Write both reports below `out` (atomically) and return the URI of `report.html`; see `collect_report`."""
    write_files(out, collect_report(recipe_name, recipe, records, artifacts, wall_seconds, peak_pss_mb))
    return storage.join(out, REPORT_HTML)


def write_files(out: str, report: Report) -> None:
    """Write a report that was collected (or read back) as JSON and HTML."""
    text = report.model_dump_json(indent=2)
    Report.model_validate_json(text)
    storage.write_bytes(storage.join(out, REPORT_HTML), render_report(report, read_curves(report)).encode())
    storage.write_bytes(storage.join(out, REPORT_JSON), (text + "\n").encode())


def render_report(report: Report, curves: Curves) -> str:
    """The page of a run; `curves` are the rows of `metrics.jsonl` by training step."""
    return _render("report.html", run_content(report, curves))


def render_comparison(runs: Sequence[Run], comparison: RunComparison, curves: Mapping[str, Curves]) -> str:
    """The page that compares runs; `curves` are the rows of `metrics.jsonl` by label of the run and training step."""
    return _render("comparison.html", comparison_content(runs, comparison, curves))


def _render(template: str, content: Mapping[str, Any]) -> str:
    return template_environment().get_template(template).render(content, titles=[])


@functools.cache
def template_environment() -> Environment:
    """The templates of the package; an unknown name in one is an error."""
    environment = Environment(
        loader=PackageLoader("nvembed.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    environment.filters.update(FILTERS, by_pair=by_pair)
    environment.globals.update(generator=GENERATOR, MEAN=MEAN)
    return environment
