"""Lays the texts of the mined data sets out as shards, streaming: queries with what is known about them, documents.

Under `<work>/checkpoints/texts/<dataset>/`: `queries/part-*.parquet` (one row per training example that has a positive)
and `documents/part-*.parquet`. The same inputs give the same bytes, so a restarted run finds its vectors still valid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from nvembed.core import storage
from nvembed.core.vectors import iter_parquet, write_shard_tables
from nvembed.data.tables import document_text
from nvembed.mining.config import MineConfig
from nvembed.text.identity import text_hash
from nvembed.types import Artifact, TaskType

STS_NEVER = (
    0.5  # pairs graded above this are never negatives, though not positives either (NV-Embed v1: gold <= 2.5 of 5)
)

QUERY_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("text", pa.string()),
        ("instruction", pa.string()),
        ("hash", pa.int64()),
        ("positives", pa.list_(pa.string())),
        ("own", pa.int32()),
        ("never", pa.list_(pa.string())),
        ("given", pa.list_(pa.string())),
    ]
)
DOCUMENT_SCHEMA = pa.schema(
    [("key", pa.string()), ("text", pa.string()), ("instruction", pa.string()), ("hash", pa.int64())]
)


@dataclass(frozen=True)
class Laid:
    """What was laid out of one data set."""

    examples: int
    queries: int
    documents: int
    dropped: Mapping[str, int]


def lay_out(prepare: Artifact, dataset: str, info: Mapping[str, Any], config: MineConfig, uri: str) -> Laid:
    """Write the query and document shards of one retrieval or sts data set under `uri`."""
    task = TaskType(info["task"])
    examples_uri = prepare.path(dataset, "examples-train.parquet")
    shared = _positives_of_repeated_queries(examples_uri, task, config)
    counts: Counter[str] = Counter()
    queries = write_shard_tables(
        _queries(examples_uri, task, info["instruction"], config, shared, counts),
        storage.join(uri, "queries"),
        config.encode.shard_rows,
    )
    documents = 0
    if queries:
        instruction = info["instruction"] if task.symmetric else ""
        documents = write_shard_tables(
            _documents(prepare.path(dataset, "corpus.parquet"), instruction),
            storage.join(uri, "documents"),
            config.encode.shard_rows,
        )
    dropped = {reason: count for reason, count in sorted(counts.items()) if reason != "examples"}
    return Laid(counts["examples"], queries, documents, dropped)


def positives_and_never(items: list[dict[str, Any]], task: TaskType, config: MineConfig) -> tuple[list[str], list[str]]:
    """Ids that count as positives of an example, and ids that must not be its negatives (a superset)."""
    if task is not TaskType.STS:
        ids = [item["id"] for item in items]
        return ids, ids
    positives = [item["id"] for item in items if (item["score"] or 0.0) >= config.sts_positive]
    close = [item["id"] for item in items if (item["score"] or 0.0) > STS_NEVER]
    return positives, sorted({*positives, *close})


def _positives_of_repeated_queries(
    uri: str, task: TaskType, config: MineConfig
) -> dict[int, tuple[set[str], set[str]]]:
    """(positives, never) by query hash, for query texts that several examples share.

    Memory is eight bytes per example plus the repeated ones: the rows are read twice instead of held.
    """
    hashes = [
        np.array([text_hash(text) for text in table.column("query").to_pylist()], dtype=np.int64)
        for table in iter_parquet(uri, ["query"])
    ]
    if not hashes:
        return {}
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    shared: dict[int, tuple[set[str], set[str]]] = {int(value): (set(), set()) for value in values[counts > 1]}
    if not shared:
        return {}
    for table, hash_N in zip(iter_parquet(uri, ["positives"]), hashes, strict=True):
        for digest, items in zip(hash_N, table.column("positives").to_pylist(), strict=True):
            if int(digest) in shared:
                positives, never = positives_and_never(items, task, config)
                shared[int(digest)][0].update(positives)
                shared[int(digest)][1].update(never)
    return shared


def _queries(
    uri: str,
    task: TaskType,
    instruction: str,
    config: MineConfig,
    shared: Mapping[int, tuple[set[str], set[str]]],
    counts: Counter[str],
) -> Iterator[pa.Table]:
    for table in iter_parquet(uri, ["id", "query", "positives", "negatives"]):
        rows = []
        for row in table.to_pylist():
            counts["examples"] += 1
            own, never = positives_and_never(row["positives"], task, config)
            if not own:
                counts["graded_below_sts_positive" if task is TaskType.STS else "without_positive"] += 1
                continue
            digest = text_hash(row["query"])
            all_positives, all_never = shared.get(digest, (set(own), set(never)))
            rows.append(
                {
                    "key": row["id"],
                    "text": row["query"],
                    "instruction": instruction,
                    "hash": digest,
                    # The example's own first; the rest are positives of the same query text in other examples.
                    "positives": own + sorted(all_positives - set(own)),
                    "never": sorted(all_never | set(never)),
                    "given": [item["id"] for item in row["negatives"]],
                    "own": len(own),
                }
            )
        yield pa.Table.from_pylist(rows, schema=QUERY_SCHEMA)


def _documents(uri: str, instruction: str) -> Iterator[pa.Table]:
    for table in iter_parquet(uri, ["id", "title", "text", "split"]):
        rows = []
        for row in table.to_pylist():
            if row["split"] not in (None, "train"):  # a held-out text is never anyone's negative
                continue
            text = document_text(row["title"], row["text"])
            rows.append({"key": row["id"], "text": text, "instruction": instruction, "hash": text_hash(text)})
        yield pa.Table.from_pylist(rows, schema=DOCUMENT_SCHEMA)
