"""Queries that occur whole inside other texts: by hash of their first words, confirmed word by word.

Words are compared case-folded, symbols count as words. The keys of the queries, 8 bytes each, go to every task; a task
holds them and one shard of texts (`near.py`). Queries shorter than the wanted number of words are left out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from nvembed.core import storage
from nvembed.core.parquet import part_uri, read_rows, read_table, write_table
from nvembed.core.ray_tasks import run_tasks
from nvembed.data.dedup.minhash import WordHashes, runs
from nvembed.data.dedup.near import SplitPairs, TextShards

_BATCH_TEXTS = 2048
_QUERIES = pa.schema(
    [("key", pa.uint64()), ("query", pa.int64()), ("split", pa.int8()), ("words", pa.list_(pa.uint64()))]
)
_PAIRS = pa.schema([("query", pa.int64()), ("text", pa.int64())])


@dataclass(frozen=True)
class _Pairing:
    texts: TextShards
    words: int
    split_pairs: SplitPairs


def contained_pairs(texts: TextShards, words: int, *, split_pairs: SplitPairs) -> np.ndarray:
    """int64 [K, 2]: (query, text) numbers, where the text contains the query's words, one after the other.

    Args:
        texts: what to compare; queries are those marked so.
        words: shorter queries are left out.
        split_pairs: (split of the query, split of the text) to compare, as codes.
    """
    if not len(texts.split):
        return np.zeros((0, 2), np.int64)
    pairing = _Pairing(texts, words, split_pairs)
    run_tasks(functools.partial(_keys, pairing), texts.shards, texts.uri, "shards of queries")
    run_tasks(functools.partial(_look, pairing), texts.shards, texts.uri, "shards of texts that may hold a query")
    matches = pa.concat_tables([read_table(part_uri(texts.uri, "contained", shard)) for shard in range(texts.shards)])
    for folder in ("queries", "contained"):
        storage.remove(storage.join(texts.uri, folder))
    pairs = np.stack([matches.column(name).to_numpy() for name in _PAIRS.names], axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _keys(pairing: _Pairing, shard: int) -> None:
    """The queries of a shard that are long enough: hash of the first words, and all words."""
    table = read_table(part_uri(pairing.texts.uri, "texts", shard))
    query_rows = np.flatnonzero(table.column("query").to_numpy())
    hasher = WordHashes()
    columns: dict[str, list[object]] = {name: [] for name in _QUERIES.names}
    for start in range(0, len(query_rows), _BATCH_TEXTS):
        rows = query_rows[start : start + _BATCH_TEXTS]
        hashed = hasher.words(table.column("text").take(pa.array(rows)).to_pylist())
        first = runs(hashed, pairing.words)
        for place in np.flatnonzero(np.diff(hashed.starts) >= pairing.words).tolist():
            columns["key"].append(first.flat[first.starts[place]])
            columns["query"].append(shard * pairing.texts.shard_rows + int(rows[place]))
            columns["split"].append(int(table.column("split")[int(rows[place])].as_py()))
            columns["words"].append(hashed.row(place))
    write_table(pa.table(columns, schema=_QUERIES), part_uri(pairing.texts.uri, "queries", shard))


def _look(pairing: _Pairing, shard: int) -> None:
    """The pairs whose text is of this shard."""
    parts = [part_uri(pairing.texts.uri, "queries", number) for number in range(pairing.texts.shards)]
    keys = np.unique(np.concatenate([read_table(part, ["key"]).column("key").to_numpy() for part in parts]))
    table = read_table(part_uri(pairing.texts.uri, "texts", shard))
    hasher = WordHashes()
    hits: list[tuple[int, int, int]] = []  # key, row, place in the row
    words_of_row: dict[int, np.ndarray] = {}  # of the rows that were hit
    for start in range(0, table.num_rows if len(keys) else 0, _BATCH_TEXTS):
        hashed = hasher.words(table.column("text").slice(start, _BATCH_TEXTS).to_pylist())
        windows = runs(hashed, pairing.words)
        hit = np.flatnonzero(keys[np.minimum(np.searchsorted(keys, windows.flat), len(keys) - 1)] == windows.flat)
        row_M = np.searchsorted(windows.starts, hit, side="right") - 1
        place_M = hit - windows.starts[row_M]
        hits += zip(windows.flat[hit].tolist(), (start + row_M).tolist(), place_M.tolist(), strict=True)
        words_of_row.update({start + row: hashed.row(row).copy() for row in np.unique(row_M).tolist()})
    matches: list[tuple[int, int]] = []
    queries = _queries_of(parts, {key for key, _, _ in hits}) if hits else {}
    for key, row, place in hits:
        number = shard * pairing.texts.shard_rows + row
        for query, split, words in queries[key]:
            allowed = query != number and (split, int(pairing.texts.split[number])) in pairing.split_pairs
            if allowed and np.array_equal(words_of_row[row][place : place + len(words)], words):
                matches.append((query, number))
    pairs = sorted(set(matches))
    columns = [pa.array([pair[place] for pair in pairs], pa.int64()) for place in (0, 1)]
    write_table(pa.table(columns, schema=_PAIRS), part_uri(pairing.texts.uri, "contained", shard))


def _queries_of(parts: list[str], keys: set[int]) -> dict[int, list[tuple[int, int, np.ndarray]]]:
    """The queries of some keys: (number, split, hashes of all words)."""
    wanted = pa.array(sorted(keys), pa.uint64())
    queries: dict[int, list[tuple[int, int, np.ndarray]]] = {}
    for part in parts:
        for row in read_rows(part, "key", wanted).to_pylist():
            words = np.array(row["words"], np.uint64)
            queries.setdefault(row["key"], []).append((row["query"], row["split"], words))
    return queries
