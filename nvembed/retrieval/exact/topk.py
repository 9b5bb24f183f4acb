"""Results of a search: fp64 scores in a fixed order, the best k with ties by id, lists merged pairwise.

Shapes: Q queries, K results, P (query, document) pairs, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

_PAIR_BLOCK = 512  # rows of fp64 terms that stay in a core's cache

Item = TypeVar("Item")


def pair_scores(left_PD: np.ndarray, right_PD: np.ndarray) -> np.ndarray:
    """fp64 inner product of each pair of fp32 rows, in an order fixed by D alone.

    Products of fp32 numbers are exact in fp64; what lies behind the largest power of two is folded onto the front,
    again and again. Every operation is elementwise: neither row count, memory layout, threads nor the BLAS matter.

    Returns:
        float64 [P].
    """
    return gathered_scores(left_PD, np.arange(len(left_PD)), right_PD, np.arange(len(left_PD)))


def gathered_scores(left_QD: np.ndarray, rows_P: np.ndarray, right_ND: np.ndarray, columns_P: np.ndarray) -> np.ndarray:
    """`pair_scores` of `left_QD[rows_P]` and `right_ND[columns_P]`, a cacheful at a time."""
    pairs, dim = len(rows_P), left_QD.shape[1]
    out_P = np.zeros(pairs, dtype=np.float64)
    buffer = np.empty((min(_PAIR_BLOCK, pairs), dim))
    for start in range(0, pairs, _PAIR_BLOCK):
        part = slice(start, min(start + _PAIR_BLOCK, pairs))
        terms = buffer[: part.stop - start]
        np.multiply(left_QD[rows_P[part]], right_ND[columns_P[part]], out=terms, dtype=np.float64)
        width = dim
        while width > 1:
            half = fold_width(width)
            np.add(terms[:, : width - half], terms[:, half:width], out=terms[:, : width - half])
            width = half
        out_P[part] = terms[:, 0] if dim else 0.0
    return out_P + 0.0  # no minus zero


def fold_width(width: int) -> int:
    """The largest power of two below `width` (> 1)."""
    return 1 << ((width - 1).bit_length() - 1)


def order_by_score(rows_P: np.ndarray, scores_P: np.ndarray, ids_P: np.ndarray) -> np.ndarray:
    """Permutation that sorts by (row, score descending, id ascending); ids are only compared where scores tie."""
    order = np.lexsort((-scores_P, rows_P))
    rows, scores = rows_P[order], scores_P[order]
    tied = (rows[1:] == rows[:-1]) & (scores[1:] == scores[:-1])
    if not tied.any():
        return order
    edges = np.flatnonzero(np.diff(np.concatenate([[False], tied, [False]]).astype(np.int8)))
    for start, end in zip(edges[::2], edges[1::2] + 1, strict=True):
        run = order[start:end]
        order[start:end] = run[sorted(range(len(run)), key=lambda index: ids_P[run[index]])]
    return order


def contenders(rows_P: np.ndarray, scores_P: np.ndarray, k: int, queries: int) -> np.ndarray:
    """bool [P]: what reaches the k-th score of its row, ties included; cheaper than sorting the rest."""
    counts_Q = np.bincount(rows_P, minlength=queries)
    width = int(counts_Q.max(initial=0))
    if width <= 2 * k or width * queries > 4 * len(rows_P):  # little to drop, or a few rows hold most of them
        return np.ones(len(rows_P), dtype=bool)
    order = np.argsort(rows_P, kind="stable")
    place_P = np.arange(len(rows_P)) - (np.cumsum(counts_Q) - counts_Q)[rows_P[order]]
    wide_QW = np.full((queries, width), -np.inf)
    wide_QW[rows_P[order], place_P] = scores_P[order]
    kth_Q = np.partition(wide_QW, width - k, axis=1)[:, width - k]
    return np.asarray(scores_P >= kth_Q[rows_P])


class Best:
    """The best k (score, id) of each query among all that were added.

    Attributes:
        scores_QK: float64 [Q, K], best first, -inf where fewer were added.
        ids_QK: int64 or object [Q, K]; meaningless where the score is -inf.
    """

    def __init__(self, queries: int, k: int, id_type: np.dtype | type = object) -> None:
        self.k = k
        self.scores_QK = np.full((queries, k), -np.inf)
        self.ids_QK = np.full((queries, k), "" if np.dtype(id_type) == object else -1, dtype=id_type)

    def add(self, rows_P: np.ndarray, scores_P: np.ndarray, ids_P: np.ndarray) -> None:
        """Merge scored documents in; `rows_P` says whose. A document is added once."""
        wanted_P = scores_P >= self.scores_QK[rows_P, -1]
        rows_P, scores_P, ids_P = rows_P[wanted_P], scores_P[wanted_P], ids_P[wanted_P]
        if len(rows_P) == 0:
            return
        touched, position_P = np.unique(rows_P, return_inverse=True)
        old = np.isfinite(self.scores_QK[touched])
        old_row, old_column = old.nonzero()
        rows = np.concatenate([old_row, position_P])
        scores = np.concatenate([self.scores_QK[touched][old], scores_P])
        ids = np.concatenate([self.ids_QK[touched][old_row, old_column], ids_P])
        reaching = contenders(rows, scores, self.k, len(touched))
        rows, scores, ids = rows[reaching], scores[reaching], ids[reaching]
        order = order_by_score(rows, scores, ids)
        rows, scores, ids = rows[order], scores[order], ids[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows, side="left")
        first = rank < self.k
        self.scores_QK[touched[rows[first]], rank[first]] = scores[first]
        self.ids_QK[touched[rows[first]], rank[first]] = ids[first]


def tree_merge(items: Iterable[Item], merge: Callable[[Item, Item], Item]) -> Item | None:
    """Merge a stream pairwise, like with like: every item passes through log2(n) merges, and no more than log2(n) wait.

    Returns:
        None for an empty stream.
    """
    waiting: list[tuple[int, Item]] = []
    for item in items:
        level = 0
        while waiting and waiting[-1][0] == level:
            item = merge(waiting.pop()[1], item)
            level += 1
        waiting.append((level, item))
    if not waiting:
        return None
    whole = waiting.pop()[1]
    while waiting:
        whole = merge(waiting.pop()[1], whole)
    return whole
