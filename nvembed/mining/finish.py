"""The end of mining: parts joined into one table per data set, the cap on documents, the index's recall, reuse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nvembed.core import storage
from nvembed.core.retry import retried
from nvembed.core.steps import load_artifact
from nvembed.core.vectors import iter_parquet, list_shards, read_slice, read_table
from nvembed.mining import capping
from nvembed.mining.audit import Audit
from nvembed.mining.config import MineConfig
from nvembed.mining.lists import one_array
from nvembed.mining.mined import MINED_SCHEMA
from nvembed.mining.search import MinePaths, Searcher
from nvembed.mining.searched import SEARCHED_SCHEMA
from nvembed.retrieval.exact.search import search_shards
from nvembed.types import Artifact, UserError

_GROUP_ROWS = 8192
Tables = Callable[[], Iterable[pa.Table]]
_SAME = ("retriever", "sts_positive")  # what an earlier step must have in common to be selected from again


def merge_parts(
    config: MineConfig, paths: MinePaths, dataset: str, parts: Sequence[str], work_uri: str, audit: Audit
) -> int:
    """Write `<dataset>/mined.parquet`, and `searched.parquet` where there was a search, from the parts in order.

    One part is in memory at a time; with a cap on documents, all candidates of the data set are (`capping.py`).
    """
    mined = [storage.join(paths.select, dataset, f"{part}.parquet") for part in parts]
    with_cap = config.max_per_document is not None and bool(mined)
    tables: Tables = functools.partial(_read, mined, MINED_SCHEMA)
    if with_cap:
        tables = functools.partial(capping.tables, mined, capping.capped(mined, config))
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


def index_recall(searcher: Searcher, dataset: str, work_uri: str) -> dict[str, float]:
    """Share of the exact top `depth` that the approximate index found, over the first `recall_queries` queries."""
    config = searcher.config
    wanted = config.search.recall_queries
    parts: list[np.ndarray] = []
    for name in list_shards(storage.join(searcher.paths.texts, dataset, "queries")):
        if sum(map(len, parts)) >= wanted:
            break
        parts.append(searcher.query_vectors({"dataset": dataset, "shards": [name]}, 0))
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
        UserError: the earlier step is no mine step of the same data, had other settings, or kept no search.
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
    for key in (*_SAME, "depth"):
        if manifest["config"].get(key) != ours[key]:
            raise UserError(
                f"mine.reuse {config.reuse} was searched with {key} = {manifest['config'].get(key)}, the recipe says "
                f"{ours[key]}. Set {key} to the same, or mine again without `reuse`."
            )
    if not any(name.endswith("searched.parquet") for name in manifest["files"]):
        raise UserError(f"mine.reuse {config.reuse} kept no search (an older nvembed, or a random rule). Mine again.")
