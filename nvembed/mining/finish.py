"""The mined table: the rows of a group, groups joined into one file per data set, the cap on documents; the checks of
`reuse` and of an approximate index.

Shapes: Q queries, P candidates of all queries together, N positives, G negatives that the data gives, K mined ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nvembed.core import storage
from nvembed.core.parquet import iter_parquet, list_shards, read_slice, read_table
from nvembed.core.retry import retried
from nvembed.core.steps import load_artifact
from nvembed.data.tables import SCORED_IDS
from nvembed.mining.audit import Audit
from nvembed.mining.config import MineConfig
from nvembed.mining.layout import MinePaths
from nvembed.mining.lists import (
    SEARCHED_SCHEMA,
    codes,
    filtered,
    first_of_each,
    flat,
    list_array,
    one_array,
    owners,
    places,
    scored_array,
    starts,
)
from nvembed.mining.rules import ABSENT, cap_documents
from nvembed.mining.search import Searcher
from nvembed.retrieval.exact.search import search_shards
from nvembed.types import Artifact, UserError

MINED_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("positives", SCORED_IDS, nullable=False),
        pa.field("negatives", SCORED_IDS, nullable=False),
        pa.field("known_positives", pa.list_(pa.string()), nullable=False),
    ]
)
_GROUP_ROWS = 8192
Tables = Callable[[], Iterable[pa.Table]]
_SAME_KEYS = ("retriever", "sts_positive")  # what an earlier step must have in common to be selected from again


# -- the rows of a group -----------------------------------------------------------------------------------------------


def own_positives(queries: pa.Table, positives: pa.ChunkedArray | None) -> pa.ListArray:
    """The positives of the examples themselves (`SCORED_IDS`), without those of other examples with the same text.

    Args:
        queries: columns `positives` (ids), `own` (how many are the example's).
        positives: scores of the positives (`SCORED_IDS`); None: they have no scores.
    """
    start_Q, ids = flat(queries.column("positives"))
    if positives is None:
        scores = pa.nulls(len(ids), pa.float64())
    else:
        scored_Q, values = flat(positives)
        scores = values.field("score")
        if not (np.array_equal(scored_Q, start_Q) and values.field("id").equals(ids)):  # an id is named twice
            by_id = [{item["id"]: item["score"] for item in items} for items in positives.to_pylist()]
            names = queries.column("positives").to_pylist()
            pairs = [scores[key] for scores, keys in zip(by_id, names, strict=True) for key in keys]
            scores = pa.array(pairs, pa.float64())
    own_N = places(start_Q) < queries.column("own").to_numpy().astype(np.int64)[owners(start_Q)]
    return scored_array(filtered(start_Q, own_N), ids.filter(pa.array(own_N)), scores.filter(pa.array(own_N)))


def ranks_of(
    start_Q: np.ndarray, ids: pa.StringArray, at_H: np.ndarray, owner_H: np.ndarray, wanted: pa.ListArray
) -> np.ndarray:
    """int64 [N]: the rank (1-based) in its query's list of each wanted id; 0 where it is not there.

    Args:
        start_Q, ids: the lists.
        at_H, owner_H: places in `ids`, and their queries, that may hold what is wanted; the others are not looked at.
        wanted: ids (`SCORED_IDS`) of each query.
    """
    wanted_Q, values = flat(wanted)
    owner_N = owners(wanted_Q)
    (id_H, id_N), above = codes(ids.take(pa.array(at_H)), values.field("id"))
    place_N = np.zeros(len(owner_N), dtype=np.int64)
    if len(at_H):
        pair_H, pair_N = owner_H * above + id_H, owner_N * above + id_N
        order_H = np.argsort(pair_H)
        near_N = order_H[np.minimum(np.searchsorted(pair_H[order_H], pair_N), len(order_H) - 1)]
        same_N = pair_H[near_N] == pair_N
        place_N[same_N] = (at_H[near_N] - start_Q[owner_H[near_N]] + 1)[same_N]
    return place_N


def best_rank(rank_N: np.ndarray, start_Q: np.ndarray) -> np.ndarray:
    """int64 [Q]: the best rank of each query's positives; 0 where all lie below the searched depth."""
    far = np.iinfo(np.int64).max
    best_Q = np.full(len(start_Q) - 1, far)
    np.minimum.at(best_Q, owners(start_Q), np.where(rank_N > 0, rank_N, far))
    return np.where(best_Q == far, 0, best_Q)


def mined_table(
    queries: pa.Table, positives: pa.ListArray, mined: pa.ListArray, limit: int, *, capped: bool
) -> tuple[pa.Table, int]:
    """Rows of `MINED_SCHEMA`, and how many of their negatives the data set itself gives.

    Those come first (score null), mined ones fill up. With a cap on documents all candidates stay until all
    groups are joined.

    Args:
        queries: columns `key`, `never`, `given`.
        positives: the examples' own.
        mined: candidates, best first.
        limit: negatives wanted per query.
    """
    negatives, given = _with_given(queries, mined, limit)
    if not capped:
        start_Q, values = flat(negatives)
        if np.diff(start_Q).max(initial=0) > limit:
            values = values.filter(pa.array(places(start_Q) < limit))
            start_Q = starts(np.minimum(np.diff(start_Q), limit))
            negatives = scored_array(start_Q, values.field("id"), values.field("score"))
    columns = [queries.column("key"), positives, negatives, _sorted_sets(queries.column("never"))]
    return pa.table(columns, schema=MINED_SCHEMA), given


def _with_given(queries: pa.Table, mined: pa.ListArray, limit: int) -> tuple[pa.ListArray, int]:
    given_Q, given = flat(queries.column("given"))
    if not len(given):
        return mined, 0
    never_Q, never = flat(queries.column("never"))
    mined_Q, values = flat(mined)
    (code_G, code_N, code_K), above = codes(given, never, values.field("id"))
    pair_G, pair_K = owners(given_Q) * above + code_G, owners(mined_Q) * above + code_K
    good_G = np.zeros(len(pair_G), dtype=bool)
    good_G[np.unique(pair_G, return_index=True)[1]] = True  # the first of each
    good_G &= ~np.isin(pair_G, owners(never_Q) * above + code_N)
    good_G = first_of_each(good_G, given_Q, limit)
    new_K = ~np.isin(pair_K, pair_G[good_G])
    owner_P = np.concatenate([owners(given_Q)[good_G], owners(mined_Q)[new_K]])
    order_P, count = pa.array(np.argsort(owner_P, kind="stable")), int(good_G.sum())
    new = values.filter(pa.array(new_K))
    ids = pa.concat_arrays([given.filter(pa.array(good_G)), new.field("id")])
    scores = pa.concat_arrays([pa.nulls(count, pa.float64()), new.field("score")])
    start_Q = starts(np.bincount(owner_P, minlength=queries.num_rows))
    return scored_array(start_Q, ids.take(order_P), scores.take(order_P)), count


def _sorted_sets(column: pa.ChunkedArray) -> pa.Array:
    """Each list sorted, every id once, as layout writes them already."""
    start_Q, ids = flat(column)
    owner_N = owners(start_Q)
    rising_N = np.asarray(pc.less(ids.slice(0, max(len(ids) - 1, 0)), ids.slice(1)))
    if (rising_N | (owner_N[1:] != owner_N[:-1])).all():
        return list_array(start_Q, ids, pa.list_(pa.string()))
    return pa.array([sorted(set(keys)) for keys in column.to_pylist()], pa.list_(pa.string()))


# -- the cap on documents ----------------------------------------------------------------------------------------------


def capped_negatives(uris: Sequence[str], config: MineConfig) -> list[np.ndarray]:
    """Which negatives of each part stay when no document may serve more queries than the cap; given ones always do.

    Candidates are those that were searched: a query that loses too many of them is left with fewer negatives. All of
    the data set are in memory at once: some 80 bytes each (`rules.cap_documents` included).

    Args:
        uris: parts of one data set (`MINED_SCHEMA`) with all candidates that qualify.

    Returns:
        bool over the flat negatives of each part.
    """
    assert config.max_per_document is not None
    lengths, given, scores, documents, examples = [], [], [], [], []
    for uri in uris:
        table = read_table(uri, ["example_id", "negatives"])
        start_Q, values = flat(table.column("negatives"))
        given_P = np.asarray(values.field("score").is_null())
        lengths.append(np.diff(start_Q))
        given.append(given_P)
        scores.append(np.asarray(values.field("score").drop_null()))
        documents.append(values.field("id").filter(pa.array(~given_P)).dictionary_encode())
        examples += table.column("example_id").chunks
    start_Q, given_P = starts(np.concatenate(lengths)), np.concatenate(given)
    mined_P = np.flatnonzero(~given_P)
    owner_M = owners(start_Q)[mined_P]
    first_Q = starts(np.bincount(owner_M, minlength=len(start_Q) - 1))
    column_M = places(first_Q)
    shape = len(first_Q) - 1, int(np.diff(first_Q).max(initial=0))
    documents_QC, scores_QC = np.full(shape, ABSENT, dtype=np.int64), np.full(shape, -np.inf)
    documents_QC[owner_M, column_M] = _codes(documents)
    scores_QC[owner_M, column_M] = np.concatenate(scores)
    order_Q = np.empty(shape[0], dtype=np.int64)
    order_Q[np.asarray(pc.sort_indices(pa.chunked_array(examples, pa.string())))] = np.arange(shape[0])
    column_QK = cap_documents(documents_QC, scores_QC, config.num_negatives, config.max_per_document, order_Q)
    row, place = np.nonzero(column_QK != ABSENT)
    stays_P = given_P
    stays_P[mined_P[first_Q[row] + column_QK[row, place]]] = True
    stays_P = first_of_each(stays_P, start_Q, config.num_negatives)
    return np.split(stays_P, np.cumsum([len(part) for part in given])[:-1])


def capped_tables(uris: Sequence[str], stays: Sequence[np.ndarray]) -> Iterator[pa.Table]:
    """The parts with the negatives that stay (`MINED_SCHEMA`), one in memory at a time."""
    for uri, stays_P in zip(uris, stays, strict=True):
        table = read_table(uri).cast(MINED_SCHEMA)
        start_Q, values = flat(table.column("negatives"))
        values = values.filter(pa.array(stays_P))
        negatives = scored_array(filtered(start_Q, stays_P), values.field("id"), values.field("score"))
        place = MINED_SCHEMA.get_field_index("negatives")
        yield table.set_column(place, MINED_SCHEMA.field(place), negatives)


def _codes(parts: Sequence[pa.DictionaryArray]) -> np.ndarray:
    """The same number for the same string in all parts, as int64."""
    whole = pa.chunked_array(parts).unify_dictionaries()
    return np.concatenate([np.asarray(chunk.indices).astype(np.int64) for chunk in whole.chunks])


# -- one table per data set --------------------------------------------------------------------------------------------


def join_groups(
    config: MineConfig, paths: MinePaths, dataset: str, parts: Sequence[str], work_uri: str, audit: Audit
) -> int:
    """Write `<dataset>/mined.parquet`, and `searched.parquet` where there was a search, from the parts in order.

    One part is in memory at a time; with a cap on documents, all candidates of the data set are.

    Returns:
        Rows of the mined table.
    """
    mined = [storage.join(paths.select, dataset, f"{part}.parquet") for part in parts]
    with_cap = config.max_per_document is not None and bool(mined)
    tables: Tables = functools.partial(_read, mined, MINED_SCHEMA)
    if with_cap:
        tables = functools.partial(capped_tables, mined, capped_negatives(mined, config))
    whole = storage.join(work_uri, dataset, "mined.parquet")
    total = _write(whole, tables, MINED_SCHEMA)
    for table in iter_parquet(whole, ["negatives"]):
        audit.add_hubs(table.column("negatives"))
        if with_cap:
            audit.add_examples(one_array(table.column("negatives")), config.num_negatives)
    searched = [storage.join(paths.select, dataset, f"{part}.searched") for part in parts]
    if searched and config.reuse is None and storage.exists(searched[0]):
        stored = functools.partial(_read, searched, SEARCHED_SCHEMA)
        _write(storage.join(work_uri, dataset, "searched.parquet"), stored, SEARCHED_SCHEMA)
    return total


def _read(uris: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    return (read_table(uri).cast(schema) for uri in uris)


@retried
def _write(uri: str, tables: Tables, schema: pa.Schema) -> int:
    """Rows written; `tables` is called once for every attempt."""
    rows = 0
    with storage.open_writer(uri) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in _even(tables()):
            writer.write_table(table, row_group_size=_GROUP_ROWS)
            rows += table.num_rows
    return rows


def _even(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Row groups of one size, wherever the parts end: the file's bytes then depend on its rows alone."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        while count >= _GROUP_ROWS:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, _GROUP_ROWS).combine_chunks()
            waiting, count = [whole.slice(_GROUP_ROWS)], count - _GROUP_ROWS
    if count:
        yield pa.concat_tables(waiting).combine_chunks()


# -- checks ------------------------------------------------------------------------------------------------------------


def index_recall(searcher: Searcher, dataset: str, work_uri: str) -> dict[str, float]:
    """Share of the exact top `depth` that the approximate index has, over the first `recall_queries` queries."""
    config = searcher.config
    wanted = config.search.recall_queries
    parts: list[np.ndarray] = []
    for name in list_shards(storage.join(searcher.paths.texts, dataset, "queries")):
        if sum(map(len, parts)) >= wanted:
            break
        parts.append(searcher.query_vectors(dataset, [name], 0))
    if not sum(map(len, parts)) or not wanted:
        return {"queries": 0}
    query_QD = np.concatenate(parts)[:wanted]
    shards = searcher.document_vectors(dataset)
    exact = search_shards(query_QD, shards, plain=config.depth, precision=config.search.precision).plain
    assert exact is not None
    rows = read_slice(storage.join(work_uri, dataset, "searched.parquet"), 0, wanted, ["plain"]).to_pylist()
    shares = []
    for row, ids, scores in zip(rows, exact.ids_QK, exact.scores_QK, strict=True):
        truth = set(ids[np.isfinite(scores)])
        shares.append(len(truth & {item["id"] for item in row["plain"]}) / max(len(truth), 1))
    return {"queries": len(shares), "depth": config.depth, "mean": float(np.mean(shares)), "min": float(min(shares))}


def check_reuse(config: MineConfig, prepare: Artifact) -> None:
    """Refuse to select again from a search of something else.

    Raises:
        UserError: the earlier step is no mine step of the same data, had other settings, or wrote no search.
    """
    assert config.reuse is not None
    earlier = load_artifact(config.reuse)
    manifest = earlier.manifest
    if manifest.get("kind") != "mine":
        raise UserError(f"mine.reuse {config.reuse} is a {manifest.get('kind')!r} step, not a mine step")
    if "model" in manifest["inputs"]:
        raise UserError(
            f"mine.reuse {config.reuse} was searched by a trained model (mine_again), not by mine.retriever. Name a "
            "`mine` step, or mine again with that model as mine.retriever."
        )
    if manifest["inputs"].get("prepare") != prepare.manifest_hash:
        raise UserError(f"mine.reuse {config.reuse} was mined from other data. Mine again without `reuse`.")
    ours = config.model_dump(mode="json")
    for key in (*_SAME_KEYS, "depth"):
        if manifest["config"].get(key) != ours[key]:
            raise UserError(
                f"mine.reuse {config.reuse} was searched with {key} = {manifest['config'].get(key)}, the recipe says "
                f"{ours[key]}. Set {key} to the same, or mine again without `reuse`."
            )
    if not any(name.endswith("searched.parquet") for name in manifest["files"]):
        raise UserError(f"mine.reuse {config.reuse} kept no search (an older nvembed, or a random rule). Mine again.")
