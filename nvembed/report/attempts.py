"""Reads `<out>/steps.json`, the records of every attempt of a run.

A module of its own because the pipeline and the command line need it without the rest of the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvembed.core import storage
from nvembed.core.steps import RECORDS, CorruptArtifactError


@dataclass(frozen=True)
class RunHistory:
    """The records of an output over all attempts; `steps` are as the last attempt left them."""

    steps: list[dict[str, Any]]
    wall_seconds: float
    peak_mb: float


def read_records(out: str) -> RunHistory | None:
    """The records of an output; None where it has none."""
    attempts = read_attempts(out)
    if not attempts:
        return None
    latest = {name: entry for attempt in attempts for name, entry in attempt["steps"].items()}
    return RunHistory(
        steps=[whole_step(attempts, name, entry) for name, entry in latest.items()],
        wall_seconds=float(sum(attempt["seconds"] for attempt in attempts)),
        peak_mb=float(max((attempt["peak_pss_mb"] for attempt in attempts), default=0.0)),
    )


def read_attempts(out: str) -> list[dict[str, Any]]:
    """The attempts of an output, oldest first; empty where it has none.

    Raises:
        CorruptArtifactError: the file is damaged.
    """
    file = storage.join(out, RECORDS)
    if not storage.exists(file):
        return []
    try:
        attempts = storage.read_json(file)["attempts"]
        if not all(isinstance(attempt["steps"], dict) for attempt in attempts):
            raise TypeError("an attempt has no steps")
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptArtifactError(
            f"{file} cannot be read ({error}). Move it away: only the times of earlier runs are lost."
        ) from error
    return list(attempts)


def whole_step(attempts: Sequence[Mapping[str, Any]], name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One record of a step for all attempts: the time of those that did work, and the highest peak."""
    parts = [attempt["steps"][name] for attempt in attempts if name in attempt["steps"]]
    worked = [part for part in parts if part["status"] != "skipped"] or parts
    peaks = [part["peak_pss_mb"] for part in worked if part["peak_pss_mb"] is not None]
    return {
        "name": name,
        "status": entry["status"],
        "seconds": sum(part["seconds"] for part in worked) if worked is not parts else worked[-1]["seconds"],
        "peak_pss_mb": max(peaks) if peaks else None,
        "artifact": entry["artifact"],
        "attempts": len(worked),
    }
