"""BM25 as a retriever: word statistics are the whole corpus', so one process indexes all of it.

Its place in the search's files is that of any retriever; the first part of the corpus stands for all of it there, the
others hold nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core import storage
from nvembed.core.parquet import column_size, list_shards, read_table
from nvembed.mining.searched import FOUND_SCHEMA
from nvembed.retrieval.bm25 import Bm25Index, check_memory


class WordIndexes:
    """The index of the data set that was last asked about."""

    def __init__(self) -> None:
        self._known: tuple[str, Bm25Index] | None = None

    def of(self, uri: str, dataset: str, rejected: pa.Array) -> Bm25Index:
        """The index of a data set's documents.

        Args:
            uri: their text shards.
            rejected: ids that are left out.

        Raises:
            UserError: this machine has not the memory for it.
        """
        if self._known is None or self._known[0] != dataset:
            self._known = None  # freed before the next is built
            uris = [storage.join(uri, name) for name in list_shards(uri)]
            sizes = [column_size(one, "text") for one in uris]
            documents, text_bytes = (sum(size[place] for size in sizes) for place in (0, 1))
            check_memory(dataset, documents, text_bytes, psutil.virtual_memory().available)
            rows = pa.concat_tables([read_table(one, ["key", "text"]) for one in uris])
            rows = rows.filter(pc.invert(pc.is_in(rows.column("key"), value_set=rejected)))
            self._known = dataset, Bm25Index(rows.column("key").to_pylist(), rows.column("text").to_pylist())
        return self._known[1]


def positive_scores(index: Bm25Index, queries: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Scores of each query's positives, by id."""
    wanted = [row["positives"] for row in queries]
    lists = index.search([row["text"] for row in queries], 1, wanted)[2]
    return [dict(zip(keys, scores, strict=True)) for keys, scores in zip(wanted, lists, strict=True)]


def best(index: Bm25Index, queries: Sequence[dict[str, Any]], ceiling_Q: np.ndarray, depth: int) -> pa.Table:
    """What the index holds for a group of queries (`FOUND_SCHEMA`)."""
    ids, scores, _ = index.search([row["text"] for row in queries], 4 * depth)
    rows = []
    for keys, values, ceiling in zip(ids, scores, ceiling_Q, strict=True):
        items = [{"id": key, "score": float(value)} for key, value in zip(keys, values, strict=True)]
        below = [item for item in items if item["score"] < ceiling]
        rows.append({"above": len(items) - len(below), "plain": items[:depth], "under": below[:depth]})
    return pa.Table.from_pylist(rows, schema=FOUND_SCHEMA)


def nothing(queries: int) -> pa.Table:
    """What a part of the corpus holds that another part stands for."""
    return pa.Table.from_pylist([{"above": 0, "plain": [], "under": []}] * queries, schema=FOUND_SCHEMA)
