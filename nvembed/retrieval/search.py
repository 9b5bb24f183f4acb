"""Exact inner-product top-k over document shards, in bounded memory, the same bytes for any division into shards.

fp32 block products only *propose*; what counts is the fp64 dot of each pair, added up in a fixed order. A document can
be left out only when its fp32 score proves that its fp64 score is too low: the distance between the two is at most
`D * 2^-24 * |q| * |d|` (Higham, Accuracy and Stability, 3.1, any order of summation), and every cut keeps that margin
on the safe side. No over-fetch factor has to be guessed, and ties of any number are settled by id.

Shapes: Q queries, N documents of a block, D dimensions, k results, P (query, document) pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

QUERY_BLOCK = 1024
_PAIR_BLOCK = 8192
_UNIT_ROUNDOFF = 2.0**-24


def pair_scores(left_PD: np.ndarray, right_PD: np.ndarray) -> np.ndarray:
    """fp64 inner product of each pair of fp32 rows, in an order fixed by D alone.

    Products of fp32 numbers are exact in fp64; halves are then folded onto each other. Every operation is elementwise,
    so neither row count, memory layout, threads nor the BLAS can change a bit.

    Returns:
        float64 [P].
    """
    pairs, dim = left_PD.shape
    width = 1 << max(dim - 1, 0).bit_length()
    out_P = np.empty(pairs, dtype=np.float64)
    for start in range(0, pairs, _PAIR_BLOCK):
        left = left_PD[start : start + _PAIR_BLOCK].astype(np.float64)
        terms = np.zeros((left.shape[0], width))
        np.multiply(left, right_PD[start : start + _PAIR_BLOCK].astype(np.float64), out=terms[:, :dim])
        while terms.shape[1] > 1:
            half = terms.shape[1] // 2
            terms = terms[:, :half] + terms[:, half:]
        out_P[start : start + left.shape[0]] = terms[:, 0]
    return out_P


def search_exact(
    query_QD: np.ndarray,
    shards: Iterable[tuple[Sequence[str], np.ndarray]],
    k: int,
    block: int = 8192,
    *,
    below_Q: np.ndarray | None = None,
) -> tuple[list[list[str]], np.ndarray]:
    """The k documents with the highest inner product for every query; ties by id, ascending.

    Args:
        query_QD: float32 [Q, D].
        shards: `(ids, float32 [N, D])`, read once; ids are unique over all shards.
        k: results per query.
        block: documents multiplied at once.
        below_Q: float64 [Q]; only documents whose score is strictly below count (the mining rule's ceiling).

    Returns:
        ids [Q][<= k] best first, and float64 scores [Q, k], -inf where fewer than k documents exist (k is cut to the
        number of documents).
    """
    if k < 1:
        raise ValueError(f"k is {k}; at least one result per query is needed")
    query_QD = np.ascontiguousarray(query_QD, dtype=np.float32)
    ceilings_Q = np.full(len(query_QD), np.inf) if below_Q is None else np.asarray(below_Q, dtype=np.float64)
    groups = [
        _Group(query_QD[start : start + QUERY_BLOCK], k, ceilings_Q[start : start + QUERY_BLOCK])
        for start in range(0, len(query_QD), QUERY_BLOCK)
    ]
    total = 0
    for ids_N, document_ND in _blocks(shards, block):
        total += len(ids_N)
        for group in groups:
            group.add(ids_N, document_ND)
    width = min(k, total)
    ids_QK = [list(row[:width][np.isfinite(scores[:width])]) for g in groups for row, scores in g.rows()]
    scores_QK = np.concatenate([g.scores_QK[:, :width] for g in groups]) if groups else np.empty((0, width))
    return ids_QK, scores_QK


def _blocks(shards: Iterable[tuple[Sequence[str], np.ndarray]], block: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shards cut and joined into blocks of `block` documents: small shards would waste time on small products."""
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    count = 0
    for ids, matrix_ND in shards:
        if len(ids) != len(matrix_ND):
            raise ValueError(f"a shard has {len(ids)} ids and {len(matrix_ND)} vectors")
        if not np.isfinite(matrix_ND).all():
            raise ValueError(f"a document vector in the shard that starts with id {ids[0]!r} is not finite")
        ids_N = np.array(ids, dtype=object)
        start = 0
        while count + len(ids_N) - start >= block:
            end = start + block - count
            yield _join([*waiting, (ids_N[start:end], matrix_ND[start:end])])
            waiting, count, start = [], 0, end
        if start < len(ids_N):
            waiting.append((ids_N[start:], matrix_ND[start:]))
            count += len(ids_N) - start
    if count:
        yield _join(waiting)


def _join(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    # A copy in any case: torch refuses to promise anything about the read-only memory that Arrow hands out.
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([part for _, part in parts]).astype(np.float32)


class _Group:
    """Running top-k of one block of queries."""

    def __init__(self, query_QD: np.ndarray, k: int, ceilings_Q: np.ndarray) -> None:
        if not np.isfinite(query_QD).all():
            raise ValueError("a query vector is not finite")
        self.query_QD = query_QD
        self.torch_QD = torch.from_numpy(query_QD)
        self.k = k
        self.ceilings_Q = ceilings_Q
        self.norms_Q = np.linalg.norm(query_QD.astype(np.float64), axis=1)
        self.scores_QK = np.full((len(query_QD), k), -np.inf)
        self.ids_QK = np.full((len(query_QD), k), "", dtype=object)

    def rows(self) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        return zip(self.ids_QK, self.scores_QK, strict=True)

    def add(self, ids_N: np.ndarray, document_ND: np.ndarray) -> None:
        """Merge a block of documents."""
        rows_P, columns_P = self._proposals(document_ND)
        if len(rows_P) == 0:
            return
        scores_P = np.empty(len(rows_P))
        for start in range(0, len(rows_P), _PAIR_BLOCK):
            pairs = slice(start, start + _PAIR_BLOCK)
            scores_P[pairs] = pair_scores(self.query_QD[rows_P[pairs]], document_ND[columns_P[pairs]])
        keep_P = (scores_P >= self.scores_QK[rows_P, -1]) & (scores_P < self.ceilings_Q[rows_P])
        self._merge(rows_P[keep_P], scores_P[keep_P], ids_N[columns_P[keep_P]])

    def _proposals(self, document_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(query, document) positions that may belong to the top k; everything else provably does not."""
        dim = document_ND.shape[1]
        longest = float(np.linalg.norm(document_ND.astype(np.float64), axis=1).max())
        margin_Q = 1.01 * dim * _UNIT_ROUNDOFF * self.norms_Q * longest + 1e-30
        approx_QN = self.torch_QD @ torch.from_numpy(document_ND).T
        cut_Q = self.scores_QK[:, -1] - margin_Q
        capped = bool(np.isfinite(self.ceilings_Q).any())
        possible_QN = self._between(approx_QN, cut_Q, self.ceilings_Q + margin_Q if capped else None)
        if np.count_nonzero(possible_QN.numpy()) > 4 * self.k * len(self.query_QD):
            # Too many to rescore: k documents of this block surely below the ceiling bound the k-th score from below.
            sure_QN = approx_QN
            if capped:
                ceiling_Q1 = _float32_below(self.ceilings_Q - margin_Q)[:, None]
                sure_QN = torch.where(approx_QN < ceiling_Q1, approx_QN, -torch.inf)
            if sure_QN.shape[1] >= self.k:
                kth_Q = torch.topk(sure_QN, self.k, dim=1, sorted=False).values.amin(dim=1).double().numpy()
                cut_Q = np.maximum(cut_Q, kth_Q - 2 * margin_Q)
            possible_QN = self._between(approx_QN, cut_Q, self.ceilings_Q + margin_Q if capped else None)
        rows, columns = possible_QN.nonzero(as_tuple=True)
        return rows.numpy(), columns.numpy()

    def _between(self, approx_QN: torch.Tensor, low_Q: np.ndarray, high_Q: np.ndarray | None) -> torch.Tensor:
        possible_QN = approx_QN >= _float32_below(low_Q)[:, None]
        if high_Q is not None:
            possible_QN &= approx_QN <= -_float32_below(-high_Q)[:, None]
        return possible_QN

    def _merge(self, rows_P: np.ndarray, scores_P: np.ndarray, ids_P: np.ndarray) -> None:
        if len(rows_P) == 0:
            return
        touched, position_P = np.unique(rows_P, return_inverse=True)
        old = np.isfinite(self.scores_QK[touched])
        old_row, old_column = old.nonzero()
        rows = np.concatenate([old_row, position_P])
        scores = np.concatenate([self.scores_QK[touched][old], scores_P])
        ids = np.concatenate([self.ids_QK[touched][old_row, old_column], ids_P])
        order = order_by_score(rows, scores, ids)
        rows, scores, ids = rows[order], scores[order], ids[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows, side="left")
        first = rank < self.k
        self.scores_QK[touched[rows[first]], rank[first]] = scores[first]
        self.ids_QK[touched[rows[first]], rank[first]] = ids[first]


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


def _float32_below(values_Q: np.ndarray) -> torch.Tensor:
    """The next fp32 number below each fp64 value: rounding never moves a cut to the wrong side."""
    with np.errstate(over="ignore"):
        rounded = values_Q.astype(np.float32)
    return torch.from_numpy(np.nextafter(rounded, np.float32(-np.inf)))
