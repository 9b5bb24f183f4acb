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
from nvembed.report.collect import collect_report
from nvembed.report.compare import RunComparison
from nvembed.report.comparison_page import comparison_sections
from nvembed.report.run_page import Curves, run_sections
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
    """Write both reports below `out` (atomically) and return the URI of `report.html`.

    Args:
        out: output root.
        recipe_name, recipe, records, artifacts, wall_seconds: as in `collect_report`.
        peak_pss_mb: peak of the run's memory; None where it was not measured.
    """
    report = collect_report(recipe_name, recipe, records, artifacts, wall_seconds, peak_pss_mb)
    write_files(out, report)
    return storage.join(out, REPORT_HTML)


def write_files(out: str, report: Report) -> None:
    """Write a report that was collected (or read back) as JSON and HTML."""
    text = report.model_dump_json(indent=2)
    Report.model_validate_json(text)
    storage.write_bytes(storage.join(out, REPORT_HTML), render_report(report, read_curves(report)).encode())
    storage.write_bytes(storage.join(out, REPORT_JSON), (text + "\n").encode())


def render_report(report: Report, curves: Curves) -> str:
    """The page of a run, `templates/report.html`.

    Args:
        report: the content of `report.json`.
        curves: rows of `metrics.jsonl` by training step.
    """
    sections = run_sections(report, curves)
    return template_environment().get_template("report.html").render(report=report, sections=sections)


def render_comparison(runs: Sequence[Run], comparison: RunComparison, curves: Mapping[str, Curves]) -> str:
    """The page that compares runs, `templates/comparison.html`.

    Args:
        runs: the runs, labelled.
        comparison: the result of `compare_runs`.
        curves: rows of `metrics.jsonl` by run label and training step.
    """
    sections = comparison_sections(runs, comparison, curves)
    return template_environment().get_template("comparison.html").render(runs=runs, sections=sections)


@functools.cache
def template_environment() -> Environment:
    """The templates of the package; an unknown name in one is an error."""
    environment = Environment(
        loader=PackageLoader("nvembed.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    environment.globals["generator"] = GENERATOR
    return environment
