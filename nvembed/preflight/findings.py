"""What a check found: its state, what was seen, what to do about it (layer 6). Shared by doctor and preflight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


class PreflightError(RuntimeError):
    """This machine lacks something the recipe needs. Exit code 3."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `fix` says what to do about a problem."""

    check: str
    state: str
    said: str
    fix: str = ""


def as_text(findings: Sequence[Finding]) -> str:
    """Problems and notes in full, the rest in short."""
    width = max(len(finding.check) for finding in findings)
    marks = {OK: "   ", NOTE: " ! ", PROBLEM: "!! "}
    lines = []
    for finding in findings:
        fix = f"  -> {finding.fix}" if finding.fix else ""
        lines.append(f"{marks[finding.state]}{finding.check:<{width}}  {finding.said}{fix}")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """The findings as plain values."""
    return [asdict(finding) for finding in findings]
