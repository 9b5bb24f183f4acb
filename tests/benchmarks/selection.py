"""The pipeline's selection after the search: over whole arrays against the tests' plain oracle, and its files.

    OMP_NUM_THREADS=1 python tests/benchmarks/selection.py [--queries 8192] [--documents 200000] [--depth 100]

One group of queries as a search leaves it, generated: one positive each, between 1 and some hundreds of documents above
the ceiling of TopK-PercPos 0.95, one document in fifty a copy of another; seven negatives per query. Both make the
same mined rows and the same numbers for the audit (checked). Prints CPU microseconds of one thread per query, ratios
within a round, and apart from them what hashing the candidates' texts costs (once per part of the corpus) and what
reading and writing the group's files costs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

NEGATIVES, SHARE = 7, 0.95


def sibling(path: str) -> Any:
    """A module of the tests by its path from here."""
    file = Path(__file__).parent / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rankings(queries: int, documents: int, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Documents and scores [Q, C] best first, how many reach the ceiling, the positive and its score [Q]."""
    positive_Q, score_Q = generator.integers(documents, size=queries), generator.uniform(0.6, 0.9, queries)
    ceiling_Q = score_Q - (1 - SHARE) * score_Q
    above_Q = 1 + np.minimum(generator.geometric(0.05, queries), 400)
    above_Q[generator.random(queries) < 0.02] += 150  # some positives lie deep
    column_C = np.arange(int(above_Q.max()) + 200)
    place_Q = (above_Q * generator.random(queries)).astype(np.int64)  # of the positive
    stride_Q = generator.integers(1, documents // len(column_C), queries)
    other_QC = np.where(column_C < place_Q[:, None], column_C + 1, np.where(column_C == place_Q[:, None], 0, column_C))
    document_QC = (positive_Q[:, None] + stride_Q[:, None] * other_QC) % documents
    left_QC = (above_Q[:, None] - column_C) / (above_Q[:, None] + 1.0)
    near_QC = ceiling_Q[:, None] + (score_Q - ceiling_Q)[:, None] * left_QC
    far_QC = ceiling_Q[:, None] - (column_C - above_Q[:, None] + 1) * 1e-3
    ahead_QC = score_Q[:, None] + (place_Q[:, None] - column_C) * 1e-4
    near_QC = np.where(column_C <= place_Q[:, None], ahead_QC, near_QC)
    return document_QC, np.where(column_C < above_Q[:, None], near_QC, far_QC), above_Q, positive_Q, score_Q


def group(queries: int, documents: int, depth: int) -> tuple[pa.Table, pa.Table, pa.Table]:
    """(queries, what was searched with hashes, documents with hashes)."""
    from nvembed.mining.layout import QUERY_SCHEMA
    from nvembed.mining.lists import ScoredLists, list_array, scored_array, starts

    generator = np.random.default_rng(0)
    keys = pa.array([f"document-{number:08d}" for number in range(documents)])
    hash_N = generator.integers(-(2**62), 2**62, documents)
    hash_N[generator.integers(documents, size=documents // 50)] = hash_N[: documents // 50]
    document_QC, score_QC, above_Q, positive_Q, score_Q = rankings(queries, documents, generator)

    def lists(first_Q: np.ndarray) -> tuple[pa.Array, pa.Array]:
        at_QK = first_Q[:, None] + np.arange(depth)
        at_P = np.take_along_axis(document_QC, at_QK, axis=1).reshape(-1)
        scores = np.take_along_axis(score_QC, at_QK, axis=1).reshape(-1)
        lists = ScoredLists(starts(np.full(queries, depth)), keys.take(pa.array(at_P)), scores, hash_N[at_P])
        return lists.columns()

    one_Q, names = np.arange(queries + 1), pa.array([f"query-{number:08d}" for number in range(queries)])
    positives = keys.take(pa.array(positive_Q))
    plain, under = lists(np.zeros(queries, dtype=np.int64)), lists(above_Q)
    searched = {
        "example_id": names,
        "positives": scored_array(one_Q, positives, pa.array(score_Q)),
        "ceiling": pa.array(score_Q - (1 - SHARE) * np.abs(score_Q)),
        "above": pa.array(above_Q),
        "plain": plain[0],
        "under": under[0],
        "plain_hashes": plain[1],
        "under_hashes": under[1],
        "never_hashes": list_array(one_Q, pa.array(hash_N[positive_Q])),
    }
    none = pa.array([[]] * queries, pa.list_(pa.string()))
    rows = {
        "key": names,
        "text": names,
        "instruction": pa.array([""] * queries),
        "hash": pa.array(np.arange(queries)),
        "positives": list_array(one_Q, positives),
        "own": pa.array(np.ones(queries, dtype=np.int32)),
        "never": list_array(one_Q, positives),
        "given": none,
    }
    corpus = pa.table({"key": keys, "hash": hash_N})
    return pa.table(rows, schema=QUERY_SCHEMA), pa.table(searched), corpus


def files(root: str, searched: pa.Table, mined: pa.Table) -> None:
    """Write and read again what a group's selection writes and reads."""
    from nvembed.core.parquet import read_table
    from nvembed.core.vectors import write_shard
    from nvembed.mining.lists import PART_SCHEMA, SEARCHED_SCHEMA

    write_shard(searched.select(SEARCHED_SCHEMA.names), f"{root}/part.searched")
    write_shard(mined, f"{root}/part.parquet")
    if not Path(f"{root}/search.parquet").exists():
        write_shard(searched.select(PART_SCHEMA.names), f"{root}/search.parquet")
    read_table(f"{root}/search.parquet")


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("queries", 8192), ("documents", 200_000), ("depth", 100), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    from nvembed.core.vectors import write_shard
    from nvembed.mining.config import MineConfig, TopKPercPos
    from nvembed.mining.layout import MinePaths, ReuseTask
    from nvembed.mining.search import Searcher
    from nvembed.mining.worker import select_negatives

    bench, oracle = sibling("search.py"), sibling("../mining/oracle.py")
    queries, searched, corpus = group(arguments.queries, arguments.documents, arguments.depth)
    config = MineConfig(
        num_negatives=NEGATIVES, depth=arguments.depth, rule=TopKPercPos(max_negative_to_positive_ratio=SHARE)
    )
    with tempfile.TemporaryDirectory() as root:
        searcher = Searcher(config, MinePaths.under(root))
        write_shard(corpus, f"{searcher.paths.texts}/set/documents/part-00000.parquet")
        task = ReuseTask("set", "part-00000", arguments.queries, (), 0)  # nothing is searched deeper
        result = searched.select(["above", "plain", "under"])
        mined = select_negatives(searcher, task, queries, [searched])[0]
        query_rows, searched_rows, section = queries.to_pylist(), searched.to_pylist(), config.model_dump()
        variants = {
            "arrays": lambda: select_negatives(searcher, task, queries, [searched]),
            "oracle": lambda: oracle.mine(section, query_rows, [searched_rows], strict=True),
            "text_hashes": lambda: searcher.hashed("set", result, queries),
            "files": lambda: files(root, searched, mined),
        }
        seconds, results = bench.interleaved(variants, arguments.rounds, time.process_time)
    rows, numbers = results["oracle"]
    assert results["arrays"][0].to_pylist() == rows
    assert results["arrays"][1].dump()["histograms"] == numbers["histograms"]
    each = {name: statistics.median(values) / arguments.queries * 1e6 for name, values in seconds.items()}
    report = {
        "queries": arguments.queries,
        "documents": arguments.documents,
        "depth": arguments.depth,
        "cpu_us_per_query": each,
        "oracle / arrays": bench.ratios(seconds, "oracle", "arrays"),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
