"""95 % intervals by the bootstrap, and paired differences of two systems over the same items.

Items (queries, texts, pairs) are drawn with replacement by a seeded generator and the metric is taken again on each
draw; the interval lies between the 2.5 % and the 97.5 % quantile. In a paired difference both systems are scored on the
same draws, so it is the interval of the difference, not of two scores. In a mean over data sets, each set is drawn on
its own (stratified).

Shapes: S draws, N items, R clusterings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from nvembed.core import storage
from nvembed.core.parquet import read_table
from nvembed.core.steps import ITEMS, SCORES
from nvembed.evaluation.metrics import contingency, spearman, v_measure
from nvembed.types import Artifact, UserError

Interval = dict[str, float]  # value, low, high
Statistic = Callable[[np.ndarray], np.ndarray]  # item positions [S, N] -> the metric on each draw [S]

MEAN = "mean of retrieval sets"
RETRIEVAL_METRIC = "ndcg_at_10"
PRIMARY_METRICS = ("ndcg_at_10", "accuracy", "spearman")
_BLOCK_ITEMS = 2_000_000  # numbers drawn at once; bounds memory, whatever N is


def draw(statistic: Statistic, count: int, samples: int, seed: int, salt: str = "") -> np.ndarray:
    """The statistic on `samples` draws of `count` items with replacement, [S].

    The draws depend on (count, samples, seed, salt) alone: two systems see the same ones.
    """
    generator = np.random.default_rng([seed, xxhash.xxh3_64_intdigest(salt.encode())])
    block = max(1, _BLOCK_ITEMS // max(count, 1))
    parts = [
        statistic(generator.integers(0, count, (min(block, samples - start), count)))
        for start in range(0, samples, block)
    ]
    return np.concatenate(parts)


def interval(value: float, drawn_S: np.ndarray) -> Interval:
    """Value with the 2.5 % and 97.5 % quantile of the draws, never leaving the value out."""
    low, high = np.quantile(drawn_S, (0.025, 0.975))
    return {"value": float(value), "low": float(min(low, value)), "high": float(max(high, value))}


def mean_statistic(value_N: np.ndarray) -> Statistic:
    """Mean of per-item values."""
    return lambda index_SN: value_N[index_SN].mean(axis=1)


def spearman_statistic(value_N: np.ndarray, gold_N: np.ndarray) -> Statistic:
    """Rank correlation of values with gold."""
    return lambda index_SN: spearman(value_N[index_SN], gold_N[index_SN])


def bootstrap(statistic: Statistic, count: int, samples: int, seed: int) -> Interval:
    """Value on all items and its interval."""
    value = float(statistic(np.arange(count)[None])[0])
    return interval(value, draw(statistic, count, samples, seed))


def bootstrap_v_measure(label_N: np.ndarray, cluster_RN: np.ndarray, samples: int, seed: int) -> Interval:
    """Mean v-measure of R clusterings of the same items; items are drawn, the clusterings stay as they are.

    An item drawn twice agrees with itself, which lifts the v-measure of every draw; so the draws give the spread only,
    and the interval is theirs moved to have its mean at the value.
    """
    tables = [contingency(label_N, cluster_N) for cluster_N in cluster_RN]
    value = float(np.mean([v_measure(table[None])[0] for table in tables]))

    def statistic(index_SN: np.ndarray) -> np.ndarray:
        weight_SN = np.stack([np.bincount(row, minlength=len(label_N)) for row in index_SN]).astype(np.float64)
        measures = []
        for table, cluster_N in zip(tables, cluster_RN, strict=True):
            cell_N = label_N * table.shape[1] + cluster_N
            used, position_N = np.unique(cell_N, return_inverse=True)
            member_NX = np.zeros((len(cell_N), len(used)))
            member_NX[np.arange(len(cell_N)), position_N] = 1.0
            counts_SCK = np.zeros((len(weight_SN), table.size))
            counts_SCK[:, used] = weight_SN @ member_NX
            measures.append(v_measure(counts_SCK.reshape(-1, *table.shape)))
        return np.mean(measures, axis=0)

    drawn_S = draw(statistic, len(label_N), samples, seed)
    return interval(value, np.clip(drawn_S - drawn_S.mean() + value, 0.0, 1.0))


# -- paired differences -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedItems:
    """Per-item values of two systems on the same items of one data set; `gold_N` only for a rank correlation."""

    dataset: str
    metric: str
    a_N: np.ndarray
    b_N: np.ndarray
    gold_N: np.ndarray | None = None

    def statistic(self) -> Statistic:
        """The metric's difference a - b."""
        if self.metric != "spearman":
            return mean_statistic(self.a_N - self.b_N)
        assert self.gold_N is not None
        first, second = spearman_statistic(self.a_N, self.gold_N), spearman_statistic(self.b_N, self.gold_N)
        return lambda index_SN: first(index_SN) - second(index_SN)


def paired_bootstrap(pair: PairedItems, samples: int = 1000, seed: int = 0) -> Interval:
    """Difference a - b of the metric over the same items, and its interval."""
    return paired_bootstrap_mean([pair], samples, seed)


def paired_bootstrap_mean(pairs: Sequence[PairedItems], samples: int = 1000, seed: int = 0) -> Interval:
    """Mean over data sets of the difference a - b, each set drawn on its own."""
    return paired_bootstrap_runs([[pair] for pair in pairs], samples, seed)


def paired_bootstrap_runs(datasets: Sequence[Sequence[PairedItems]], samples: int = 1000, seed: int = 0) -> Interval:
    """Difference a - b where both systems were trained several times, say with several seeds.

    Each draw takes runs with replacement, the same ones for every data set, and items with replacement, the same ones
    for every run; so the interval holds what another training and other items would change. R runs say little about
    how runs spread: their part of the interval is too narrow by about sqrt((R - 1) / R).

    Args:
        datasets: for each data set a pair of every run, runs in the same order everywhere and the items of a data set
            too; the a and b of a pair are the two systems' runs that belong together.

    Returns:
        Mean over data sets and runs, and its interval.
    """
    runs = len(datasets[0])
    assert all(len(pairs) == runs for pairs in datasets), "runs are missing from some data set"
    whole = [[pair.statistic()(np.arange(len(pair.a_N))[None])[0] for pair in pairs] for pairs in datasets]
    drawn_DRS = [
        [draw(pair.statistic(), len(pair.a_N), samples, seed, pair.dataset) for pair in pairs] for pairs in datasets
    ]
    drawn_RS = np.mean(drawn_DRS, axis=0)
    chosen_SR = np.random.default_rng([seed, runs]).integers(0, runs, (samples, runs))
    drawn_S = np.take_along_axis(drawn_RS.T, chosen_SR, axis=1).mean(axis=1)
    return interval(float(np.mean(whole)), drawn_S)


def compare(
    a: Artifact,
    b: Artifact,
    name: str,
    *,
    a_system: str = "model",
    b_system: str = "model",
    metrics: Sequence[str] = PRIMARY_METRICS,
    datasets: Collection[str] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Paired differences of two evaluations (artifacts with `scores.json` and `items.parquet`).

    Args:
        datasets: only these; None: all that both have.

    Returns:
        `{name, dataset, metric, delta: {value, low, high}}`, delta = a - b: a row for each data set both have, and for
        nDCG@10 one more, `mean of retrieval sets`. Data sets that only one of them has are left out.

    Raises:
        UserError: no such system, or a data set was not the same in both evaluations.
    """
    pairs = list(paired_items(a, b, (a_system, b_system), metrics, datasets))
    rows = [_row(name, pair.dataset, pair.metric, paired_bootstrap(pair, samples, seed)) for pair in pairs]
    retrieval = [pair for pair in pairs if pair.metric == RETRIEVAL_METRIC]
    if retrieval:
        rows.append(_row(name, MEAN, RETRIEVAL_METRIC, paired_bootstrap_mean(retrieval, samples, seed)))
    return rows


def _row(name: str, dataset: str, metric: str, delta: Interval) -> dict[str, Any]:
    return {"name": name, "dataset": dataset, "metric": metric, "delta": delta}


def retrieval_mean(a: Artifact, system: str = "model", samples: int = 1000, seed: int = 0) -> Interval | None:
    """Mean nDCG@10 of a system over its retrieval sets with its interval, each set drawn on its own; None without any.

    Raises:
        UserError: no such system.
    """
    values = [
        (dataset, np.array([items[item][0] for item in sorted(items)]))
        for (dataset, metric), items in read_items(a, system).items()
        if metric == RETRIEVAL_METRIC
    ]
    if not values:
        return None
    pairs = [PairedItems(dataset, RETRIEVAL_METRIC, value_N, np.zeros_like(value_N)) for dataset, value_N in values]
    return paired_bootstrap_mean(pairs, samples, seed)


Items = Mapping[str, tuple[float, float | None]]  # item id -> value, gold


def read_items(artifact: Artifact, system: str) -> dict[tuple[str, str], Items]:
    """Items of one system by (data set, metric).

    Raises:
        UserError: the artifact has no such system.
    """
    table = read_table(artifact.path(ITEMS))
    items: dict[tuple[str, str], dict[str, tuple[float, float | None]]] = {}
    for row in table.to_pylist():
        if row["system"] == system:
            items.setdefault((row["dataset"], row["metric"]), {})[row["item_id"]] = (row["value"], row["gold"])
    if not items:
        known = sorted(set(table.column("system").to_pylist()))
        raise UserError(f"{artifact.uri} has no scores of {system!r}; it has {', '.join(known)}.")
    return dict(items)


def paired_items(
    a: Artifact,
    b: Artifact,
    systems: tuple[str, str] = ("model", "model"),
    metrics: Sequence[str] = PRIMARY_METRICS,
    datasets: Collection[str] | None = None,
) -> Iterator[PairedItems]:
    """The items both evaluations scored, data set by data set and metric by metric.

    Raises:
        UserError: no such system, or a data set was not the same in both evaluations.
    """
    hashes = [storage.read_json(artifact.path(SCORES))["evaluation_hash"] for artifact in (a, b)]
    ours, theirs = read_items(a, systems[0]), read_items(b, systems[1])
    for key in (key for key in ours if key in theirs and key[1] in metrics):
        dataset, metric = key
        if datasets is not None and dataset not in datasets:
            continue
        if hashes[0][dataset] != hashes[1][dataset] or ours[key].keys() != theirs[key].keys():
            raise UserError(
                f"{a.uri} and {b.uri} were not scored on the same items of {dataset}; evaluate both on one `prepare`."
            )
        ids = sorted(ours[key])
        a_N, b_N = (np.array([items[key][item][0] for item in ids]) for items in (ours, theirs))
        gold_N = np.array([ours[key][item][1] for item in ids], dtype=np.float64) if metric == "spearman" else None
        yield PairedItems(dataset, metric, a_N, b_N, gold_N)
