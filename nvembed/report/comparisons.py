"""Paired differences between systems, from the per-item values that evaluation kept.

Both systems are judged on the same items, so an interval is that of the difference, not of two scores: items are drawn
with replacement and the difference of the metric is taken on each draw. Over several sets each is drawn on its own and
the differences are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import rankdata

from nvembed import storage
from nvembed.registry import PRIMARY_METRICS
from nvembed.report.schema import Difference
from nvembed.types import Artifact

MEAN = "mean of retrieval sets"
RETRIEVAL = "ndcg_at_10"
OPPONENTS = ("untrained", "bm25", "minilm")  # of the teacher


@dataclass(frozen=True)
class Items:
    """Values of one system on the items of one data set: id -> (value, gold); gold only where the metric needs it."""

    metric: str
    values: Mapping[str, tuple[float, float | None]]


Systems = dict[str, dict[str, Items]]  # system -> data set -> its items under the primary metric


def read_items(sources: Sequence[tuple[Artifact, Mapping[str, str]]]) -> Systems:
    """The primary metric's items of every system.

    Args:
        sources: artifacts with an `items.parquet`, and for each {system in the file: its name in the report}.
    """
    found: Systems = {}
    for artifact, names in sources:
        fs, path = storage.filesystem(artifact.path("items.parquet"))
        with fs.open(path, "rb") as file:
            rows = pq.read_table(file, columns=["system", "dataset", "metric", "item_id", "value", "gold"]).to_pylist()
        values: dict[tuple[str, str, str], dict[str, tuple[float, float | None]]] = {}
        for row in rows:
            if row["system"] in names and row["metric"] in PRIMARY_METRICS:
                key = (names[row["system"]], row["dataset"], row["metric"])
                values.setdefault(key, {})[row["item_id"]] = (row["value"], row["gold"])
        for (system, dataset, metric), items in values.items():
            found.setdefault(system, {})[dataset] = Items(metric, items)
    return found


def compare_systems(systems: Systems, samples: int, seed: int) -> list[Difference]:
    """Teacher against the baselines and the student after against before, per data set and over the retrieval sets."""
    differences: list[Difference] = []
    for a, b in _pairs(systems):
        draws: dict[str, np.ndarray] = {}
        points: dict[str, float] = {}
        for dataset, ours in systems[a].items():
            theirs = systems[b].get(dataset)
            if theirs is None or theirs.metric != ours.metric or ours.values.keys() != theirs.values.keys():
                continue
            points[dataset], draws[dataset] = _difference(ours, theirs, samples, seed)
            differences.append(_summary(a, b, dataset, ours.metric, points[dataset], draws[dataset]))
        retrieval = [dataset for dataset in draws if systems[a][dataset].metric == RETRIEVAL]
        if retrieval:
            point = float(np.mean([points[dataset] for dataset in retrieval]))
            drawn = np.mean([draws[dataset] for dataset in retrieval], axis=0)
            differences.append(_summary(a, b, MEAN, RETRIEVAL, point, drawn))
    return differences


def _pairs(systems: Systems) -> Iterator[tuple[str, str]]:
    yield from (("teacher", other) for other in OPPONENTS if "teacher" in systems and other in systems)
    for name in systems:
        before = name.replace("student", "student_before", 1)
        if (name == "student" or name.startswith("student@")) and before in systems:
            yield name, before


def _difference(ours: Items, theirs: Items, samples: int, seed: int) -> tuple[float, np.ndarray]:
    """The difference on all items, and on each of `samples` draws [S]."""
    ids = sorted(ours.values)
    a_N = np.array([ours.values[id][0] for id in ids], dtype=np.float64)
    b_N = np.array([theirs.values[id][0] for id in ids], dtype=np.float64)
    gold_N = np.array([ours.values[id][1] for id in ids], dtype=np.float64)  # nan where there is none
    drawn_SN = np.random.default_rng(seed).integers(0, len(ids), (samples, len(ids)))
    if ours.metric != "spearman":
        delta_N = a_N - b_N
        return float(delta_N.mean()), delta_N[drawn_SN].mean(axis=1)
    draws = [spearman(a_N[row], gold_N[row]) - spearman(b_N[row], gold_N[row]) for row in drawn_SN]
    return spearman(a_N, gold_N) - spearman(b_N, gold_N), np.array(draws)


def spearman(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Rank correlation; 0 where one side is constant."""
    ranks_N, other_N = rankdata(a_N), rankdata(b_N)
    if np.ptp(ranks_N) == 0 or np.ptp(other_N) == 0:
        return 0.0
    return float(np.corrcoef(ranks_N, other_N)[0, 1])


def _summary(a: str, b: str, over: str, metric: str, value: float, drawn_S: np.ndarray) -> Difference:
    low, high = (float(bound) for bound in np.quantile(drawn_S, (0.025, 0.975)))
    clear = low > 0 or high < 0
    return Difference(a=a, b=b, over=over, metric=metric, value=value, low=low, high=high, clear=clear)
