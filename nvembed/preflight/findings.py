"""Findings of checks, and the error of a failed preflight.

Small and without imports of its own: `jobs`, `pipeline` and all checks share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


class PreflightError(RuntimeError):
    """This machine or cluster lacks something that the run needs. Exit code 3."""


@dataclass(frozen=True)
class Finding:
    """The result of one check; `fix` says what to do about a problem."""

    check: str
    state: str
    message: str
    fix: str = ""


def as_text(findings: Sequence[Finding]) -> str:
    """A line per finding, problems and notes with their fixes."""
    width = max(len(finding.check) for finding in findings)
    marks = {OK: "   ", NOTE: " ! ", PROBLEM: "!! "}
    lines = []
    for finding in findings:
        fix = f"  -> {finding.fix}" if finding.fix else ""
        lines.append(f"{marks[finding.state]}{finding.check:<{width}}  {finding.message}{fix}")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """The findings as plain values."""
    return [
        {"check": finding.check, "state": finding.state, "said": finding.message, "fix": finding.fix}
        for finding in findings
    ]
