"""Lists of scored documents as flat arrays: what stands in Arrow columns, without a Python object per candidate.

Shapes: Q queries, P candidates of all queries together, C candidates of a query (padded), K kept of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.data.tables import SCORED_IDS

_FIELDS = [SCORED_IDS.value_type.field(0), SCORED_IDS.value_type.field(1)]


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one array."""
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # pyarrow keeps chunks that an array cannot hold, and none at all
        return pa.array([], column.type) if whole.num_chunks == 0 else whole.chunk(0)
    return whole


def starts(length_Q: np.ndarray) -> np.ndarray:
    """int64 [Q + 1]: where each list starts, and the end."""
    out = np.zeros(len(length_Q) + 1, dtype=np.int64)
    np.cumsum(length_Q, out=out[1:])
    return out


def owners(start_Q: np.ndarray) -> np.ndarray:
    """int64 [P]: the list each element belongs to."""
    return np.repeat(np.arange(len(start_Q) - 1), np.diff(start_Q))


def flat(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, pa.Array]:
    """(starts, values) of a column of lists."""
    lists = one_array(column)
    return starts(np.asarray(lists.value_lengths())), lists.flatten()


def list_array(start_Q: np.ndarray, values: pa.Array, kind: pa.DataType | None = None) -> pa.ListArray:
    """Lists from where they start and their values."""
    return pa.ListArray.from_arrays(pa.array(start_Q.astype(np.int32)), values, type=kind)


def scored_array(start_Q: np.ndarray, ids: pa.Array, scores: pa.Array) -> pa.ListArray:
    """Lists of `SCORED_IDS`."""
    return list_array(start_Q, pa.StructArray.from_arrays([ids, scores], fields=_FIELDS), SCORED_IDS)


def codes(*arrays: pa.Array) -> tuple[list[np.ndarray], int]:
    """The same int64 for the same string in all arrays, and a number above all of them."""
    encoded = pa.concat_arrays(arrays).dictionary_encode()
    edges = np.cumsum([len(array) for array in arrays])[:-1]
    return np.split(np.asarray(encoded.indices).astype(np.int64), edges), max(len(encoded.dictionary), 1)


@dataclass(frozen=True)
class Lists:
    """Scored documents of Q queries, best first.

    Attributes:
        start_Q: int64 [Q + 1], where each query's begin.
        ids: P strings.
        score_P: float64.
        hash_P: int64, text hashes.
    """

    start_Q: np.ndarray
    ids: pa.StringArray
    score_P: np.ndarray
    hash_P: np.ndarray

    @classmethod
    def read(cls, scored: pa.ChunkedArray, hashes: pa.ChunkedArray) -> Lists:
        """From a column of `SCORED_IDS` and the column of hashes beside it."""
        start_Q, values = flat(scored)
        score_P = np.asarray(values.field("score").to_numpy(zero_copy_only=False))
        return cls(start_Q, values.field("id"), score_P, np.asarray(flat(hashes)[1]))

    @property
    def length_Q(self) -> np.ndarray:
        """int64 [Q]."""
        return np.diff(self.start_Q)

    def columns(self) -> tuple[pa.ListArray, pa.ListArray]:
        """As Arrow: the scored ids, and their hashes."""
        scored = scored_array(self.start_Q, self.ids, pa.array(self.score_P))
        return scored, list_array(self.start_Q, pa.array(self.hash_P))

    def merge(self, other: Lists, k: int) -> Lists:
        """The best k of both, ties by id; each query's documents are in one of the two only."""
        length_Q, more_Q = self.length_Q, other.length_Q
        width = int(length_Q.max(initial=0))
        scores_QC = np.full((len(length_Q), width + int(more_Q.max(initial=0))), -np.inf)
        at_QC = np.zeros(scores_QC.shape, dtype=np.int64)
        for lists, shift, offset in ((self, 0, 0), (other, width, len(self.score_P))):
            row_P = owners(lists.start_Q)
            column_P = np.arange(len(row_P)) - lists.start_Q[row_P] + shift
            scores_QC[row_P, column_P] = lists.score_P
            at_QC[row_P, column_P] = np.arange(len(row_P)) + offset
        order_QC = np.argsort(-scores_QC, axis=1, kind="stable")
        scores_QC = np.take_along_axis(scores_QC, order_QC, axis=1)
        at_QC = np.take_along_axis(at_QC, order_QC, axis=1)
        ids = pa.concat_arrays([self.ids, other.ids])
        both_Q = (length_Q > 0) & (more_Q > 0)  # one alone is in order already
        at_qC = at_QC[both_Q]
        _settle_ties(scores_QC[both_Q], at_qC, ids, k)
        at_QC[both_Q] = at_qC
        kept_Q = np.minimum(length_Q + more_Q, k)
        at_P = at_QC[np.arange(at_QC.shape[1]) < kept_Q[:, None]]
        score_P = np.concatenate([self.score_P, other.score_P])[at_P]
        hash_P = np.concatenate([self.hash_P, other.hash_P])[at_P]
        return Lists(starts(kept_Q), ids.take(pa.array(at_P)), score_P, hash_P)


def _settle_ties(scores_QC: np.ndarray, at_QC: np.ndarray, ids: pa.Array, k: int) -> None:
    """Sort the places of equal scores by id, in place; runs that begin behind the k-th do not matter."""
    tied_QC = (scores_QC[:, 1:] == scores_QC[:, :-1]) & np.isfinite(scores_QC[:, 1:])
    tied_QC[:, k:] = np.logical_and.accumulate(tied_QC[:, k - 1 :], axis=1)[:, 1:]
    if not tied_QC.any():
        return
    in_run_QC = np.zeros(scores_QC.shape, dtype=bool)
    in_run_QC[:, 1:] |= tied_QC
    in_run_QC[:, :-1] |= tied_QC
    first_QC = in_run_QC.copy()
    first_QC[:, 1:] &= ~tied_QC
    at_P = at_QC[in_run_QC]
    run_P = np.cumsum(first_QC[in_run_QC])
    runs = pa.table({"run": run_P, "id": ids.take(pa.array(at_P))})
    at_QC[in_run_QC] = at_P[np.asarray(pc.sort_indices(runs, [("run", "ascending"), ("id", "ascending")]))]


def joined(left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of lists, (starts, values) each, query by query one behind the other."""
    row_P = np.concatenate([owners(left[0]), owners(right[0])])
    order_P = np.argsort(row_P, kind="stable")
    return starts(np.diff(left[0]) + np.diff(right[0])), np.concatenate([left[1], right[1]])[order_P]


def interleaved(sides: Sequence[tuple[np.ndarray, pa.Array, pa.Array]], queries: int) -> pa.ListArray:
    """Lists of `SCORED_IDS` from (owner, ids, scores) of several sides, a query's first side first."""
    row_P = np.concatenate([row for row, _, _ in sides])
    order_P = pa.array(np.argsort(row_P, kind="stable"))
    ids, scores = (pa.concat_arrays([side[place] for side in sides]).take(order_P) for place in (1, 2))
    return scored_array(starts(np.bincount(row_P, minlength=queries)), ids, scores)
