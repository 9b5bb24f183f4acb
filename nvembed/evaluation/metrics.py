"""Metrics as pure functions, all per item where the metric allows it, so that intervals can be drawn from the items.

Shapes: N items, M reference items, C classes, K clusters, S draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

RECALL_DEPTH = 100  # ranks that recall counts, and so the least a query is searched for
_BLOCK = 1024


# -- retrieval --------------------------------------------------------------------------------------------------------


def ndcg(ranked: Sequence[str], gains: Mapping[str, float], k: int = 10) -> float:
    """Normalised discounted cumulative gain of one query, as trec_eval's `ndcg_cut` (Jarvelin and Kekalainen 2002).

    The gain is the judgement itself (linear), the discount log2(rank + 1), the ideal the k best judgements of all.

    Args:
        ranked: document ids, best first; ids are distinct.
        gains: judgement of each relevant document, above 0.
        k: ranks that count.

    Returns:
        0 to 1.

    Raises:
        ValueError: no document is relevant; such a query cannot be scored.
    """
    ideal = sorted((gain for gain in gains.values() if gain > 0), reverse=True)[:k]
    if not ideal:
        raise ValueError("a query without a relevant document cannot be scored")
    return _discounted([max(gains.get(key, 0.0), 0.0) for key in ranked[:k]]) / _discounted(ideal)


def _discounted(gains: Sequence[float]) -> float:
    return float(np.sum(np.asarray(gains, dtype=np.float64) / np.log2(np.arange(2, len(gains) + 2))))


def recall(ranked: Sequence[str], relevant: set[str], k: int = 100) -> float:
    """Share of the relevant documents among the first k."""
    if not relevant:
        raise ValueError("a query without a relevant document cannot be scored")
    return len(relevant.intersection(ranked[:k])) / len(relevant)


def reciprocal_rank(ranked: Sequence[str], relevant: set[str], k: int = 10) -> float:
    """1 / rank of the first relevant document, 0 if none is among the first k."""
    return next((1.0 / rank for rank, key in enumerate(ranked[:k], start=1) if key in relevant), 0.0)


def retrieval_values(
    ranked: Sequence[Sequence[str]], gains: Sequence[Mapping[str, float]], k: int = 10
) -> dict[str, list[float]]:
    """Every retrieval metric of every query, primary metric first.

    Args:
        ranked: document ids of each query, best first; as many as `RECALL_DEPTH` and `k` where the corpus has them.
        gains: judgement of each relevant document of each query, above 0.
        k: ranks that nDCG and MRR count.
    """
    pairs = list(zip(ranked, gains, strict=True))
    return {
        f"ndcg_at_{k}": [ndcg(row, gain, k) for row, gain in pairs],
        f"recall_at_{RECALL_DEPTH}": [recall(row, set(gain), RECALL_DEPTH) for row, gain in pairs],
        f"mrr_at_{k}": [reciprocal_rank(row, set(gain), k) for row, gain in pairs],
    }


# -- classes ----------------------------------------------------------------------------------------------------------


def vote(labels: Sequence[str], scores: Sequence[float]) -> str | None:
    """The label most neighbours have; ties go to the greater sum of scores, then to the first label in order.

    Returns:
        None without neighbours.
    """
    totals: dict[str, tuple[int, float]] = {}
    for label, score in zip(labels, scores, strict=True):
        count, total = totals.get(label, (0, 0.0))
        totals[label] = (count + 1, total + float(score))
    return min(totals, key=lambda label: (-totals[label][0], -totals[label][1], label), default=None)


def knn_labels(
    query_ND: np.ndarray, reference_MD: np.ndarray, reference_labels: Sequence[str], k: int
) -> list[str | None]:
    """Label of each row by `vote` of its k nearest reference rows under the inner product (cosine of unit rows).

    Equal similarities are taken in the order of the reference.
    """
    labels: list[str | None] = []
    reference = reference_MD.astype(np.float64)
    for start in range(0, len(query_ND), _BLOCK):
        similarity_BM = query_ND[start : start + _BLOCK].astype(np.float64) @ reference.T
        nearest_BK = np.argsort(-similarity_BM, axis=1, kind="stable")[:, :k]
        for row, nearest in zip(similarity_BM, nearest_BK, strict=True):
            labels.append(vote([reference_labels[index] for index in nearest], row[nearest].tolist()))
    return labels


def contingency(label_N: np.ndarray, cluster_N: np.ndarray) -> np.ndarray:
    """float64 [C, K]: how many items of each class lie in each cluster; both given as integers from 0."""
    counts_CK = np.zeros((int(label_N.max()) + 1, int(cluster_N.max()) + 1))
    np.add.at(counts_CK, (label_N, cluster_N), 1.0)
    return counts_CK


def v_measure(counts_SCK: np.ndarray) -> np.ndarray:
    """Harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg 2007), of many tables at once.

    Args:
        counts_SCK: contingency tables, each with at least one item.

    Returns:
        float64 [S], 0 to 1; 1 where there is one class and one cluster.
    """
    share_SCK = counts_SCK / counts_SCK.sum(axis=(1, 2), keepdims=True)
    class_S = _entropy(share_SCK.sum(axis=2))
    cluster_S = _entropy(share_SCK.sum(axis=1))
    joint_S = _entropy(share_SCK.reshape(len(share_SCK), -1))
    total_S = class_S + cluster_S
    shared_S = np.maximum(total_S - joint_S, 0.0)
    return np.where(total_S > 0, np.minimum(2 * shared_S / np.where(total_S > 0, total_S, 1.0), 1.0), 1.0)


def _entropy(share_SX: np.ndarray) -> np.ndarray:
    return -np.sum(share_SX * np.log(np.where(share_SX > 0, share_SX, 1.0)), axis=1)


# -- graded similarity ------------------------------------------------------------------------------------------------


def spearman(a_SN: np.ndarray, b_SN: np.ndarray) -> np.ndarray:
    """Rank correlation of each row of `a_SN` with the same row of `b_SN`; ties share their mean rank.

    Returns:
        float64 [S], -1 to 1; 0 where one of them is constant and the correlation is not defined.
    """
    from scipy.stats import rankdata  # takes a second to import, and the report needs only the names of metrics

    ranks_a_SN, ranks_b_SN = (rankdata(value_SN, axis=1) for value_SN in (a_SN, b_SN))
    centred_a_SN = ranks_a_SN - ranks_a_SN.mean(axis=1, keepdims=True)
    centred_b_SN = ranks_b_SN - ranks_b_SN.mean(axis=1, keepdims=True)
    norm_S = np.sqrt((centred_a_SN**2).sum(axis=1) * (centred_b_SN**2).sum(axis=1))
    dot_S = (centred_a_SN * centred_b_SN).sum(axis=1)
    return np.where(norm_S > 0, np.clip(dot_S / np.where(norm_S > 0, norm_S, 1.0), -1.0, 1.0), 0.0)
