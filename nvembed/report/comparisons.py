"""Which systems a report sets against each other; the paired bootstrap itself is evaluation's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nvembed.evaluation.significance import MEAN, RETRIEVAL_METRIC, compare, retrieval_mean
from nvembed.report.schema import Difference, Interval
from nvembed.types import Artifact

__all__ = ["MEAN", "RETRIEVAL_METRIC", "Scored", "compare_systems", "retrieval_means"]

OPPONENTS = ("untrained", "bm25", "minilm")  # of the teacher


@dataclass(frozen=True)
class Scored:
    """Where the scores of a system are: the artifact, and the system's name in its files."""

    artifact: Artifact
    system: str


def compare_systems(systems: Mapping[str, Scored], settings: Mapping[str, Any]) -> list[Difference]:
    """Teacher against the baselines and the student after against before, per data set and over the retrieval sets.

    Args:
        systems: by name in the report.
        settings: the recipe's evaluation section, for `bootstrap_samples` and `seed`.
    """
    differences = []
    for a, b in _pairs(systems):
        ours, theirs = systems[a], systems[b]
        rows = compare(
            ours.artifact,
            theirs.artifact,
            f"{a} - {b}",
            a_system=ours.system,
            b_system=theirs.system,
            samples=settings.get("bootstrap_samples", 1000),
            seed=settings.get("seed", 0),
        )
        for row in rows:
            delta = row["delta"]
            clear = delta["low"] > 0 or delta["high"] < 0
            differences.append(Difference(a=a, b=b, over=row["dataset"], metric=row["metric"], clear=clear, **delta))
    return differences


def retrieval_means(systems: Mapping[str, Scored], settings: Mapping[str, Any]) -> dict[str, Interval]:
    """Mean nDCG@10 over the retrieval sets of every system that has some, with its interval."""
    samples, seed = settings.get("bootstrap_samples", 1000), settings.get("seed", 0)
    found = {name: retrieval_mean(scored.artifact, scored.system, samples, seed) for name, scored in systems.items()}
    return {name: Interval(**mean) for name, mean in found.items() if mean is not None}


def _pairs(systems: Mapping[str, Scored]) -> Iterator[tuple[str, str]]:
    yield from (("teacher", other) for other in OPPONENTS if "teacher" in systems and other in systems)
    for name in systems:
        before = name.replace("student", "student_before", 1)
        if (name == "student" or name.startswith("student@")) and before in systems:
            yield name, before
