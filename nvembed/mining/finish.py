"""The mined table: the rows of a group, the files of the data sets, the cap on documents.

Also the checks of `reuse` and of an approximate index.

Shapes: Q queries, P candidates of all queries together, N positives, G negatives that the data gives, K mined ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core import storage
from nvembed.core.parquet import (
    Encoding,
    even_tables,
    iter_parquet,
    list_shards,
    read_slice,
    read_table,
    write_tables,
)
from nvembed.core.steps import load_artifact
from nvembed.data.tables import SCORED_IDS
from nvembed.mining.audit import Audit
from nvembed.mining.config import MineConfig
from nvembed.mining.layout import MinePaths, QueryTask
from nvembed.mining.lists import (
    SEARCHED_SCHEMA,
    chained,
    filtered,
    first_of_each,
    flat,
    grouped,
    kept,
    one_array,
    owners,
    padded,
    places,
    places_of,
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
_SAME_KEYS = ("retriever", "sts_positive")  # what an earlier step must have in common to be selected from again


# -- the rows of a group -----------------------------------------------------------------------------------------------


def own_positives(queries: pa.Table, positives: pa.ChunkedArray | None) -> pa.ListArray:
    """The positives of the examples themselves (`SCORED_IDS`), without those of other examples with the same text.

    Args:
        queries: columns `positives` (ids), `own` (how many are the example's).
        positives: scores of the positives (`SCORED_IDS`); None: they have no scores.
    """
    start_Q, ids = flat(queries.column("positives"))
    scores = pa.nulls(len(ids), pa.float64())
    if positives is not None:
        scored_Q, values = flat(positives)
        place_N = places_of(owners(start_Q), ids, scored_Q, values.field("id"))
        scores = values.field("score").take(pa.array(place_N))
    own_N = places(start_Q) < queries.column("own").to_numpy().astype(np.int64)[owners(start_Q)]
    return kept(scored_array(start_Q, ids, scores), own_N)


def ranks_of(
    start_Q: np.ndarray, ids: pa.StringArray, at_H: np.ndarray, owner_H: np.ndarray, wanted: pa.ListArray
) -> np.ndarray:
    """int64 [N]: the rank (1-based) in its query's list of each wanted id; 0 where it is not there.

    Args:
        start_Q, ids: the lists.
        at_H, owner_H: places in `ids`, rising, and their queries, that may hold what is wanted; the others are not
            looked at.
        wanted: ids (`SCORED_IDS`) of each query.
    """
    wanted_Q, values = flat(wanted)
    owner_N, near_Q = owners(wanted_Q), grouped(owner_H, len(start_Q) - 1)
    near_N = places_of(owner_N, values.field("id"), near_Q, ids.take(pa.array(at_H)))
    rank_H = at_H - start_Q[owner_H] + 1
    return np.append(rank_H, 0)[near_N]  # -1, absent, is the last


def best_rank(rank_N: np.ndarray, start_Q: np.ndarray) -> np.ndarray:
    """int64 [Q]: the best rank of each query's positives; 0 where all lie below the searched depth."""
    far = np.iinfo(np.int64).max
    best_Q = padded(start_Q, np.where(rank_N > 0, rank_N, far), far).min(axis=1, initial=far)
    return np.where(best_Q == far, 0, best_Q)


def mined_table(
    queries: pa.Table, positives: pa.ListArray, mined: pa.ListArray, config: MineConfig
) -> tuple[pa.Table, int]:
    """Rows of `MINED_SCHEMA`, and how many of their negatives the data set itself gives.

    Those come first (score null), mined ones fill up. With a cap on documents all candidates stay until all
    groups are joined.

    Args:
        queries: columns `key`, `never`, `given`.
        positives: the examples' own.
        mined: candidates, best first.
    """
    negatives, given = _with_given(queries, mined, config.num_negatives)
    if config.max_per_document is None:
        negatives = kept(negatives, places(flat(negatives)[0]) < config.num_negatives)
    known = [sorted(set(keys)) for keys in queries.column("never").to_pylist()]
    columns = [queries.column("key"), positives, negatives, pa.array(known, pa.list_(pa.string()))]
    return pa.table(columns, schema=MINED_SCHEMA), given


def _with_given(queries: pa.Table, mined: pa.ListArray, limit: int) -> tuple[pa.ListArray, int]:
    given_Q, given = flat(queries.column("given"))
    if not len(given):
        return mined, 0
    first_G = places_of(owners(given_Q), given, given_Q, given) == np.arange(len(given))
    never_G = places_of(owners(given_Q), given, *flat(queries.column("never"))) >= 0
    good_G = first_of_each(first_G & ~never_G, given_Q, limit)
    good_Q, good = filtered(given_Q, good_G), given.filter(pa.array(good_G))
    mined_Q, values = flat(mined)
    new_K = places_of(owners(mined_Q), values.field("id"), good_Q, good) < 0
    new_Q, new = flat(kept(mined, new_K))
    start_Q, order_P = chained(good_Q, new_Q)
    ids = pa.concat_arrays([good, new.field("id")]).take(pa.array(order_P))
    scores = pa.concat_arrays([pa.nulls(len(good), pa.float64()), new.field("score")]).take(pa.array(order_P))
    return scored_array(start_Q, ids, scores), len(good)


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
    first_Q = filtered(start_Q, ~given_P)
    whole = pa.chunked_array(documents).unify_dictionaries()  # the same number for the same document in all parts
    document_M = np.concatenate([np.asarray(chunk.indices).astype(np.int64) for chunk in whole.chunks])
    documents_QC = padded(first_Q, document_M, ABSENT)
    scores_QC = padded(first_Q, np.concatenate(scores), -np.inf)
    order_Q = np.empty(len(documents_QC), dtype=np.int64)
    order_Q[np.asarray(pc.sort_indices(pa.chunked_array(examples, pa.string())))] = np.arange(len(order_Q))
    column_QK = cap_documents(documents_QC, scores_QC, config.num_negatives, config.max_per_document, order_Q)
    row, place = np.nonzero(column_QK != ABSENT)
    stays_P = given_P
    stays_P[mined_P[first_Q[row] + column_QK[row, place]]] = True
    stays_P = first_of_each(stays_P, start_Q, config.num_negatives)
    return np.split(stays_P, np.cumsum([len(part) for part in given])[:-1])


def capped_tables(uris: Sequence[str], stays: Sequence[np.ndarray]) -> Iterator[pa.Table]:
    """The parts with the negatives that stay (`MINED_SCHEMA`), one in memory at a time."""
    place = MINED_SCHEMA.get_field_index("negatives")
    for table, stays_P in zip(_parts(uris, MINED_SCHEMA), stays, strict=True):
        yield table.set_column(place, MINED_SCHEMA.field(place), kept(table.column(place), stays_P))


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
    stays = capped_negatives(mined, config) if with_cap else []
    whole, total = storage.join(work_uri, dataset, "mined.parquet"), 0
    _write(whole, lambda: capped_tables(mined, stays) if with_cap else _parts(mined, MINED_SCHEMA), MINED_SCHEMA)
    for table in iter_parquet(whole, ["negatives"]):
        total += table.num_rows
        audit.add_hubs(table.column("negatives"))
        if with_cap:
            audit.add_examples(one_array(table.column("negatives")), config.num_negatives)
    searched = [storage.join(paths.select, dataset, f"{part}.searched") for part in parts]
    if searched and config.reuse is None and storage.exists(searched[0]):
        file = storage.join(work_uri, dataset, "searched.parquet")
        _write(file, lambda: _parts(searched, SEARCHED_SCHEMA), SEARCHED_SCHEMA)
    return total


def _parts(uris: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    return (read_table(uri).cast(schema) for uri in uris)


def _write(uri: str, tables: Callable[[], Iterable[pa.Table]], schema: pa.Schema) -> None:
    """Row groups of one size, wherever the parts end: the file's bytes then depend on its rows alone."""
    write_tables(lambda: even_tables(tables(), _GROUP_ROWS), schema, uri, Encoding(compression="zstd"))


# -- checks ------------------------------------------------------------------------------------------------------------


def index_recall(searcher: Searcher, dataset: str, work_uri: str) -> dict[str, float]:
    """Share of the exact top `depth` that the approximate index has, over the first `recall_queries` queries."""
    config = searcher.config
    wanted = config.search.recall_queries
    parts: list[np.ndarray] = []
    for name in list_shards(storage.join(searcher.paths.texts, dataset, "queries")):
        if sum(map(len, parts)) >= wanted:
            break
        parts.append(searcher.query_vectors(QueryTask(dataset, "", 0, [name]), 0))
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
