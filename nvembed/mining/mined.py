"""The mined table of a group of queries, and where their positives ranked; over whole arrays.

Shapes: Q queries, P plain candidates of all queries, N positives of all queries, G negatives that the data gives.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.data.tables import SCORED_IDS
from nvembed.mining.lists import codes, flat, interleaved, list_array, owners, scored_array, starts

MINED_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("positives", SCORED_IDS, nullable=False),
        pa.field("negatives", SCORED_IDS, nullable=False),
        pa.field("known_positives", pa.list_(pa.string()), nullable=False),
    ]
)


def own_positives(queries: pa.Table, positives: pa.ChunkedArray | None) -> pa.ListArray:
    """The positives of the examples themselves (`SCORED_IDS`), without those of other examples with the same text.

    Args:
        queries: columns `positives` (ids), `own` (how many are the example's).
        positives: scores of the positives (`SCORED_IDS`); None: nobody scored them.
    """
    start_Q, ids = flat(queries.column("positives"))
    if positives is None:
        scores = pa.nulls(len(ids), pa.float64())
    else:
        scored_Q, values = flat(positives)
        scores = values.field("score")
        if not (np.array_equal(scored_Q, start_Q) and values.field("id").equals(ids)):  # an id is named twice
            found = [{item["id"]: item["score"] for item in items} for items in positives.to_pylist()]
            names = queries.column("positives").to_pylist()
            pairs = [items[key] for items, keys in zip(found, names, strict=True) for key in keys]
            scores = pa.array(pairs, pa.float64())
    owner_N = owners(start_Q)
    own_Q = queries.column("own").to_numpy().astype(np.int64)
    own_N = pa.array(np.arange(len(owner_N)) - start_Q[owner_N] < own_Q[owner_N])
    count_Q = np.minimum(own_Q, np.diff(start_Q))
    return scored_array(starts(count_Q), ids.filter(own_N), scores.filter(own_N))


def placed(
    start_Q: np.ndarray, ids: pa.StringArray, at_H: np.ndarray, owner_H: np.ndarray, wanted: pa.ListArray
) -> np.ndarray:
    """int64 [N]: the place (1-based) in its query's list of each wanted id; 0 where it is not there.

    Args:
        start_Q, ids: the lists.
        at_H, owner_H: places in `ids`, and their queries, that may hold what is wanted; the others are not looked at.
        wanted: ids (`SCORED_IDS`) of each query.
    """
    wanted_Q, values = flat(wanted)
    owner_N = owners(wanted_Q)
    (found_H, wanted_N), above = codes(ids.take(pa.array(at_H)), values.field("id"))
    place_N = np.zeros(len(owner_N), dtype=np.int64)
    if len(at_H):
        pair_H, pair_N = owner_H * above + found_H, owner_N * above + wanted_N
        order_H = np.argsort(pair_H)
        near_N = order_H[np.minimum(np.searchsorted(pair_H[order_H], pair_N), len(order_H) - 1)]
        same_N = pair_H[near_N] == pair_N
        place_N[same_N] = (at_H[near_N] - start_Q[owner_H[near_N]] + 1)[same_N]
    return place_N


def best_rank(rank_N: np.ndarray, start_Q: np.ndarray) -> np.ndarray:
    """int64 [Q]: the best rank of each query's positives; 0 where none was found."""
    far = np.iinfo(np.int64).max
    best_Q = np.full(len(start_Q) - 1, far)
    np.minimum.at(best_Q, owners(start_Q), np.where(rank_N > 0, rank_N, far))
    return np.where(best_Q == far, 0, best_Q)


def mined_table(
    queries: pa.Table, positives: pa.ListArray, kept: pa.ListArray, limit: int, *, capped: bool
) -> tuple[pa.Table, int]:
    """Rows of `MINED_SCHEMA`, and how many of their negatives the data set itself gives.

    Those come first (score null), mined ones fill up. With a cap on documents all candidates stay in for now; the cap
    decides when all groups are there.

    Args:
        queries: columns `key`, `never`, `given`.
        positives: the examples' own.
        kept: mined candidates, best first.
        limit: negatives wanted per query.
    """
    negatives, given = _with_given(queries, kept, limit)
    if not capped:
        start_Q, values = flat(negatives)
        if np.diff(start_Q).max(initial=0) > limit:
            first_K = np.arange(len(values)) - np.repeat(start_Q[:-1], np.diff(start_Q)) < limit
            values = values.filter(pa.array(first_K))
            start_Q = starts(np.minimum(np.diff(start_Q), limit))
            negatives = scored_array(start_Q, values.field("id"), values.field("score"))
    columns = [queries.column("key"), positives, negatives, _sorted_sets(queries.column("never"))]
    return pa.table(columns, schema=MINED_SCHEMA), given


def _with_given(queries: pa.Table, kept: pa.ListArray, limit: int) -> tuple[pa.ListArray, int]:
    given_Q, given = flat(queries.column("given"))
    if not len(given):
        return kept, 0
    never_Q, never = flat(queries.column("never"))
    kept_Q, values = flat(kept)
    (code_G, code_N, code_K), above = codes(given, never, values.field("id"))
    pair_G, pair_K = owners(given_Q) * above + code_G, owners(kept_Q) * above + code_K
    good_G = np.zeros(len(pair_G), dtype=bool)
    good_G[np.unique(pair_G, return_index=True)[1]] = True  # the first of each
    good_G &= ~np.isin(pair_G, owners(never_Q) * above + code_N)
    so_far_G = np.cumsum(good_G)
    before_Q = np.concatenate([[0], so_far_G])[given_Q[:-1]]
    good_G &= so_far_G - before_Q[owners(given_Q)] <= limit
    new_K = ~np.isin(pair_K, pair_G[good_G])
    sides = [
        (owners(given_Q)[good_G], given.filter(pa.array(good_G)), pa.nulls(int(good_G.sum()), pa.float64())),
        (owners(kept_Q)[new_K], *(values.field(name).filter(pa.array(new_K)) for name in ("id", "score"))),
    ]
    return interleaved(sides, queries.num_rows), int(good_G.sum())


def _sorted_sets(column: pa.ChunkedArray) -> pa.Array:
    """Each list sorted, every id once; they are laid out like that."""
    start_Q, ids = flat(column)
    owner_N = owners(start_Q)
    rising_N = np.asarray(pc.less(ids.slice(0, max(len(ids) - 1, 0)), ids.slice(1)))
    if (rising_N | (owner_N[1:] != owner_N[:-1])).all():
        return list_array(start_Q, ids, pa.list_(pa.string()))
    return pa.array([sorted(set(keys)) for keys in column.to_pylist()], pa.list_(pa.string()))
