"""Lists of scored documents as flat arrays, in Arrow columns and out of them, without a Python object per candidate.

Shapes: Q queries, P candidates of all queries together, C candidates of a query (padded), K selected.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.data.tables import SCORED_IDS
from nvembed.retrieval.exact.search import SearchResult
from nvembed.retrieval.exact.topk import Best, tree_merge

# What a search of one part of a corpus gives for each query: how many documents reach the ceiling, the best documents,
# the best below the ceiling, and the text hashes of these and of the query's `never` documents. Selection needs nothing
# else of the corpus.
PART_SCHEMA = pa.schema(
    [
        ("above", pa.int64()),
        ("plain", SCORED_IDS),
        ("under", SCORED_IDS),
        *((name, pa.list_(pa.int64())) for name in ("plain_hashes", "under_hashes", "never_hashes")),
    ]
)
SEARCHED_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("positives", SCORED_IDS, nullable=False),
        pa.field("ceiling", pa.float64(), nullable=False),
        pa.field("above", pa.int64(), nullable=False),
        pa.field("plain", SCORED_IDS, nullable=False),
        pa.field("under", SCORED_IDS, nullable=False),
    ]
)
_FIELDS = [SCORED_IDS.value_type.field(0), SCORED_IDS.value_type.field(1)]


# -- columns of lists -------------------------------------------------------------------------------------------------


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


def places(start_Q: np.ndarray) -> np.ndarray:
    """int64 [P]: the place (from 0) of each element in its list."""
    return np.arange(start_Q[-1]) - np.repeat(start_Q[:-1], np.diff(start_Q))


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


def grouped(owner_P: np.ndarray, lists: int) -> np.ndarray:
    """int64 [Q + 1]: where the lists start, from the (rising) list that each element belongs to."""
    return starts(np.bincount(owner_P, minlength=lists))


def filtered(start_Q: np.ndarray, keep_P: np.ndarray) -> np.ndarray:
    """int64 [Q + 1]: where the lists start when only some elements stay."""
    return grouped(owners(start_Q)[keep_P], len(start_Q) - 1)


def kept(column: pa.ChunkedArray | pa.Array, keep_P: np.ndarray) -> pa.ListArray:
    """A column of lists with only some of its elements."""
    start_Q, values = flat(column)
    return list_array(filtered(start_Q, keep_P), values.filter(pa.array(keep_P)), column.type)


def padded(start_Q: np.ndarray, values_P: np.ndarray, fill: Any, width: int | None = None) -> np.ndarray:
    """[Q, C] of lists that follow each other, `fill` behind the end of each; a view where all are of one length.

    Args:
        width: C, no shorter than the longest list; that one's length by default.
    """
    length_Q = np.diff(start_Q)
    present_QC = np.arange(length_Q.max(initial=0) if width is None else width) < length_Q[:, None]
    if len(values_P) == present_QC.size:
        return values_P.reshape(present_QC.shape)
    out_QC = np.full(present_QC.shape, fill, dtype=values_P.dtype)
    out_QC[present_QC] = values_P
    return out_QC


def first_of_each(keep_P: np.ndarray, start_Q: np.ndarray, count: int) -> np.ndarray:
    """bool [P]: of the elements that may stay, the first `count` of each list."""
    total_P = np.cumsum(keep_P)
    before_Q = np.concatenate([[0], total_P])[start_Q[:-1]]
    return keep_P & (total_P - before_Q[owners(start_Q)] <= count)


def places_of(owner_N: np.ndarray, ids: pa.Array, start_Q: np.ndarray, values: pa.Array) -> np.ndarray:
    """int64 [N]: where each id first occurs in its query's list, as a place among `values`; -1 where it does not."""
    codes = pa.concat_arrays([ids, values]).dictionary_encode()
    code_N, code_P = np.split(np.asarray(codes.indices).astype(np.int64), [len(ids)])
    above = len(codes.dictionary)
    pair_N, pair_P = pa.array(owner_N * above + code_N), pa.array(owners(start_Q) * above + code_P)
    return np.asarray(pc.index_in(pair_N, value_set=pair_P).fill_null(-1)).astype(np.int64)


def chained(*starts_of_columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of lists joined query by query: where the lists start, and the order of the columns' values."""
    owner_P = np.concatenate([owners(start_Q) for start_Q in starts_of_columns])
    length_Q = np.sum([np.diff(start_Q) for start_Q in starts_of_columns], axis=0)
    return starts(length_Q), np.argsort(owner_P, kind="stable")


def joined(left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of lists, (starts, values) each, query by query one behind the other."""
    start_Q, order_P = chained(left[0], right[0])
    return start_Q, np.concatenate([left[1], right[1]])[order_P]


def lowest_scores(positives: pa.ChunkedArray) -> np.ndarray:
    """float64 [Q], the lowest score in each of some lists (`SCORED_IDS`), none of which is empty."""
    start_Q, values = flat(positives)
    assert (np.diff(start_Q) > 0).all(), "a query without a positive"
    score_P = np.asarray(values.field("score").to_numpy(zero_copy_only=False))
    return np.minimum.reduceat(score_P, start_Q[:-1]) if len(score_P) else np.empty(0)


# -- scored documents -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredLists:
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
    def read(cls, scored: pa.ChunkedArray, hashes: pa.ChunkedArray) -> ScoredLists:
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

    def take(self, start_Q: np.ndarray, at_K: np.ndarray) -> ScoredLists:
        """The documents at some places of the flat arrays, as lists that start at `start_Q`."""
        return ScoredLists(start_Q, self.ids.take(pa.array(at_K)), self.score_P[at_K], self.hash_P[at_K])

    @staticmethod
    def end_to_end(lists: Sequence[ScoredLists]) -> ScoredLists:
        """All documents of some lists one behind the other, in one list."""
        score_P = np.concatenate([each.score_P for each in lists])
        ids, hash_P = pa.concat_arrays([each.ids for each in lists]), np.concatenate([each.hash_P for each in lists])
        return ScoredLists(np.array([0, len(score_P)]), ids, score_P, hash_P)

    @staticmethod
    def gather(parts: Sequence[tuple[np.ndarray, ScoredLists]], queries: int) -> ScoredLists:
        """Lists of some queries each, by (rows, lists), as lists of all; a query that is in several has its last."""
        last_Q = np.zeros(queries, dtype=np.int64)
        for number, (rows, _) in enumerate(parts):
            last_Q[rows] = number
        owner_P = np.concatenate([rows[owners(lists.start_Q)] for rows, lists in parts])
        part_P = np.repeat(np.arange(len(parts)), [len(lists.ids) for _, lists in parts])
        at_K = np.flatnonzero(part_P == last_Q[owner_P])
        at_K = at_K[np.argsort(owner_P[at_K], kind="stable")]
        return ScoredLists.end_to_end([lists for _, lists in parts]).take(grouped(owner_P[at_K], queries), at_K)

    def merge(self, other: ScoredLists, k: int) -> ScoredLists:
        """The best k of both, ties by id; each query's documents are in one of the two only."""
        whole, length_Q, more_Q = ScoredLists.end_to_end([self, other]), self.length_Q, other.length_Q
        at_P, count = np.arange(len(whole.ids)), len(self.ids)
        both = ((self.start_Q, slice(count)), (other.start_Q, slice(count, None)))
        scores_QC = np.hstack([padded(start_Q, whole.score_P[part], -np.inf) for start_Q, part in both])
        at_QC = np.hstack([padded(start_Q, at_P[part], 0) for start_Q, part in both])
        order_QC = np.argsort(-scores_QC, axis=1, kind="stable")
        scores_QC = np.take_along_axis(scores_QC, order_QC, axis=1)
        at_QC = np.take_along_axis(at_QC, order_QC, axis=1)
        both_Q = (length_Q > 0) & (more_Q > 0)  # one alone is in order already
        at_qC = at_QC[both_Q]
        _settle_ties(scores_QC[both_Q], at_qC, whole.ids, k)
        at_QC[both_Q] = at_qC
        length_Q = np.minimum(length_Q + more_Q, k)
        return whole.take(starts(length_Q), at_QC[np.arange(at_QC.shape[1]) < length_Q[:, None]])


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


def take_turns(lists: Sequence[ScoredLists], count: int) -> ScoredLists:
    """Up to `count` of each query: the best of every list in turn, then the second best, ...; every text once."""
    queries = len(lists[0].start_Q) - 1
    owner_P = np.concatenate([owners(each.start_Q) for each in lists])
    place_P = np.concatenate([places(each.start_Q) for each in lists])
    order_P = np.lexsort((place_P, owner_P))  # stable: of equal places the first list's comes first
    owner_P = owner_P[order_P]
    whole = ScoredLists.end_to_end(lists).take(grouped(owner_P, queries), order_P)
    new_P = np.zeros(len(order_P), dtype=bool)
    new_P[np.unique(np.stack([owner_P, whole.hash_P], axis=1), axis=0, return_index=True)[1]] = True
    new_P = first_of_each(new_P, whole.start_Q, count)
    return whole.take(grouped(owner_P[new_P], queries), np.flatnonzero(new_P))


# -- what a search gives ----------------------------------------------------------------------------------------------


def search_table(result: SearchResult) -> pa.Table:
    """The result of one search, a row per query: the columns of `PART_SCHEMA` without the hashes."""
    queries = len(result.above_Q)
    lists = {"plain": _best_lists(result.plain, queries), "under": _best_lists(result.under, queries)}
    return pa.table({"above": pa.array(result.above_Q, pa.int64()), **lists})


def _best_lists(best: Best | None, queries: int) -> pa.ListArray:
    if best is None:
        return pa.array([[]] * queries, SCORED_IDS)
    real_QK = np.isfinite(best.scores_QK)
    ids, scores = pa.array(best.ids_QK[real_QK], pa.string()), pa.array(best.scores_QK[real_QK], pa.float64())
    return scored_array(starts(real_QK.sum(axis=1)), ids, scores)


def merge_parts(parts: Iterable[pa.Table], depth: int) -> pa.Table:
    """The parts of one query group, pairwise into the whole (`PART_SCHEMA`); few of them are in memory at a time."""
    whole = tree_merge(parts, lambda left, right: _merge_two(left, right, depth))
    assert whole is not None
    return whole


def _merge_two(left: pa.Table, right: pa.Table, depth: int) -> pa.Table:
    columns = {"above": pc.add(left.column("above"), right.column("above"))}
    for name in ("plain", "under"):
        first, second = (ScoredLists.read(part.column(name), part.column(f"{name}_hashes")) for part in (left, right))
        columns[name], columns[f"{name}_hashes"] = first.merge(second, depth).columns()
    never = [flat(part.column("never_hashes")) for part in (left, right)]
    start_Q, hash_P = joined(*((start_Q, np.asarray(values)) for start_Q, values in never))
    columns["never_hashes"] = list_array(start_Q, pa.array(hash_P))
    return pa.table(columns, schema=PART_SCHEMA)
