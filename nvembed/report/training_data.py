"""The training data of a run: data mixes from the manifests, quality of the negatives from the mining audit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from nvembed.report.schema import Mixed, Negatives
from nvembed.types import Artifact

DRAWN = ("asked", "rows", "realised", "usable", "epochs")  # what a stream's manifest says of each data set
STREAMS = ("stream_stage_1", "stream_stage_2", "stream_student")


def data_mixes(artifacts: Mapping[str, Artifact]) -> dict[str, dict[str, Mixed]]:
    """By stream step: every data set in it, with its configured and its realised share."""
    info = artifacts["prepare"].manifest["metrics"]["datasets"] if "prepare" in artifacts else {}
    tasks = {name: dataset["task"] for name, dataset in info.items()}
    mixes = {}
    for step in STREAMS:
        manifest = artifacts[step].manifest if step in artifacts else {"config": {}, "metrics": {}}
        drawn = manifest["metrics"].get("datasets", {})
        if "weights" in manifest["config"]:
            mixes[step] = {
                name: Mixed(task=tasks.get(name), weight=weight, **{key: drawn[name][key] for key in DRAWN})
                for name, weight in manifest["config"]["weights"].items()
                if name in drawn
            }
        elif drawn and "teacher_embeddings" in artifacts:
            # a student's stream draws all teacher embeddings equally often; their data sets are those of their texts
            counts = artifacts["teacher_embeddings"].manifest["metrics"]["datasets"]["vectors"]
            (stream,) = drawn.values()
            shared = {"weight": None, "asked": None, "rows": None, "epochs": stream["epochs"]}
            mixes[step] = {
                name: Mixed(task=tasks.get(name), realised=count / sum(counts.values()), usable=count, **shared)
                for name, count in counts.items()
            }
    return mixes


def negatives_quality(audit: Mapping[str, Any] | None) -> dict[str, Negatives]:
    """The quality of the negatives of every data set whose negatives have scores."""
    quality = {}
    for name, summary in (audit or {}).get("datasets", {}).items():
        histograms = summary["score_histograms"]
        edges, positives, negatives = (histograms[key] for key in ("edges", "positives", "negatives"))
        if any(positives) and any(negatives):
            shares = zip(_shares(positives), _shares(negatives), strict=True)
            quality[name] = Negatives(
                positive=_mean(edges, positives),
                negative=_mean(edges, negatives),
                above_median=share_above(edges, negatives, quantile(edges, positives, 0.5)),
                overlap=sum(min(pair) for pair in shares),
            )
    return quality


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts]


def _mean(edges: Sequence[float], counts: Sequence[int]) -> float:
    """Mean of binned values, each at the middle of its bin."""
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    return sum(middle * share for middle, share in zip(middles, _shares(counts), strict=True))


def quantile(edges: Sequence[float], counts: Sequence[int], share: float) -> float:
    """The value below which `share` of binned values lies, taking those of a bin as spread evenly over it."""
    wanted, below = share * sum(counts), 0.0
    for (low, high), count in zip(itertools.pairwise(edges), counts, strict=True):
        if count and below + count >= wanted:
            return low + (high - low) * (wanted - below) / count
        below += count
    return edges[-1]


def share_above(edges: Sequence[float], counts: Sequence[int], value: float) -> float:
    """Share of binned values above `value`, taking those of a bin as spread evenly over it."""
    above = 0.0
    for (low, high), count in zip(itertools.pairwise(edges), counts, strict=True):
        above += count * min(max((high - value) / (high - low), 0.0), 1.0)
    return above / (sum(counts) or 1)
