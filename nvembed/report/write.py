"""Writes `<out>/report.json` and `<out>/report.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from nvembed.core import storage
from nvembed.core.steps import REPORT_HTML, REPORT_JSON
from nvembed.report.collect import collect_report, read_curve
from nvembed.report.page import render
from nvembed.report.schema import Report
from nvembed.types import Artifact, UserError


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
        recipe_name: the recipe's name.
        recipe: the resolved recipe.
        records: one mapping per step in order, with name, status, seconds, peak_pss_mb and artifact (URI).
        artifacts: artifact by step name; steps a story does not have are simply not there.
        wall_seconds: of this run.
        peak_pss_mb: peak of the run's memory, None where it was not measured.
    """
    report = collect_report(recipe_name, recipe, records, artifacts, wall_seconds, peak_pss_mb)
    write_files(out, report)
    return storage.join(out, REPORT_HTML)


def write_files(out: str, report: Report) -> None:
    """Write a report that was collected (or read back) as JSON and HTML."""
    text = report.model_dump_json(indent=2)
    Report.model_validate_json(text)
    storage.write_bytes(storage.join(out, REPORT_HTML), render(report, read_curves(report)).encode())
    storage.write_bytes(storage.join(out, REPORT_JSON), (text + "\n").encode())


def read_curves(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Rows of `metrics.jsonl` by training step; a step whose file is gone is left out."""
    return {name: read_curve(run.metrics) for name, run in report.training.items() if storage.exists(run.metrics)}


def read_report(uri: str) -> Report:
    """`report.json` of an output, validated.

    Raises:
        UserError: it is no report, or one that this version does not read.
    """
    try:
        return Report.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{uri} is not a report this nvembed reads ({where}: {first['msg']}). It may be of a newer version, or "
            "no report.json at all."
        ) from error
