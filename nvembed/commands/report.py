"""`nvembed report`: write a run's report again, or one page that compares several runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from nvembed.commands.common import AsJson, ended, show
from nvembed.core import storage
from nvembed.pipeline.exit_codes import ExitCode
from nvembed.types import UserError

COMPARISON = "comparison.html"

Sources = Annotated[list[str], typer.Argument(metavar="RUN...", help="Outputs of runs, or their report.json.")]
Page = Annotated[
    str | None,
    typer.Option(
        "--out", metavar="FILE", help=f"The page; by default report.html of the run, {COMPARISON} here for several."
    ),
]


def report_command(runs: Sources, out: Page = None, as_json: AsJson = False) -> None:
    """Write a run's report again, or a page that compares several runs.

    One output: report.json and report.html are written again from what it has finished so far (with --out: only the
    page, there). Several: differences of the recipes, scores side by side, paired differences where the held-out
    examples are the same, curves over each other, times and memory.
    """

    def action() -> int:
        if len(runs) == 1:
            value, text = _one(runs[0], out)
        else:
            value, text = _several(runs, out or COMPARISON)
        show(value, text, as_json)
        return ExitCode.DONE

    raise ended(action)


def _one(source: str, out: str | None) -> tuple[dict[str, Any], str]:
    from nvembed.report.pages import REPORT_HTML, render_report, write_files
    from nvembed.report.runs import collect_again, locate, read_curves, read_report

    root, report_json = locate(source)
    given_file = storage.absolute(source) != root
    report = read_report(report_json) if given_file else collect_again(root)
    page = out or storage.join(root, REPORT_HTML)
    if out is None and not given_file:
        write_files(root, report)
    else:
        _write_page(page, render_report(report, read_curves(report)))
    return {"page": storage.absolute(page), "report": report.model_dump(mode="json")}, f"report: {page}"


def _several(sources: Sequence[str], page: str) -> tuple[dict[str, Any], str]:
    from nvembed.evaluation.significance import MEAN
    from nvembed.report.compare import compare_runs
    from nvembed.report.pages import render_comparison
    from nvembed.report.runs import open_runs, read_curves

    _check_page(page)
    runs = open_runs(sources)
    comparison = compare_runs(runs)
    _write_page(page, render_comparison(runs, comparison, {run.label: read_curves(run.report) for run in runs}))
    lines = [f"{run.label}  {run.report.recipe}  {run.source}" for run in runs]
    for pair in comparison.pairs:
        lines += [
            f"{row.a} - {row.b}, mean nDCG@10: {row.value:+.3f} ({row.low:+.3f} to {row.high:+.3f})"
            for row in pair.differences
            if row.over == MEAN
        ]
        lines += [f"not compared between {pair.first} and {pair.later}: {line}" for line in pair.left_out]
    lines.append(f"page: {page}")
    return {"page": storage.absolute(page), "comparison": comparison.model_dump(mode="json")}, "\n".join(lines)


def _write_page(uri: str, html: str) -> None:
    _check_page(uri)
    storage.write_bytes(uri, html.encode())


def _check_page(uri: str) -> None:
    """Refuse to replace a file that is no report page of nvembed."""
    from nvembed.report.pages import GENERATOR

    fs, path = storage.filesystem(uri)
    if fs.isdir(path):
        raise UserError(f"--out {uri} is a directory; name a file, for example {storage.join(uri, COMPARISON)}")
    if storage.exists(uri) and f'content="{GENERATOR}"'.encode() not in storage.read_bytes(uri)[:2000]:
        raise UserError(f"{uri} is there and is no report page of nvembed; choose another --out.")
