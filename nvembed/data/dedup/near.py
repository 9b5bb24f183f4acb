"""Near duplicates among any number of texts: MinHash bands partitioned by hash, candidates confirmed by exact Jaccard.

The texts lie in shards, and every pass is one task per shard (`spread.py`), handing on through files:

    texts/        split, is it a query, text              written by the caller, `SHARD_ROWS` a shard
    sketch   ->   hashes/ (shingle hashes of each text), bands/<partition of the band's key>/
    pair     ->   candidates/<shard of the first>/        texts that agree in a band, once
    fetch    ->   fetched/<shard of the second>/          candidates with the first one's shingles
    verify   ->   verified/                               pairs at or above the threshold

A task holds one shard and what was handed to it; this process holds 24 bytes a text and the near duplicates. Of texts
with equal words only the first takes part.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from nvembed.core import storage
from nvembed.core.parquet import iter_parquet, part_uri, read_table, write_table
from nvembed.core.ray_tasks import run_tasks
from nvembed.data.config import NearDuplicateConfig
from nvembed.data.dedup.minhash import Ragged, WordHashes, band_keys, band_shape, runs, signatures
from nvembed.text.identity import jaccard

SHARD_ROWS = 65536
_BATCH_TEXTS = 2048
_FLUSH_PAIRS = 1 << 22

TEXT_SCHEMA = pa.schema([("split", pa.int8()), ("query", pa.bool_()), ("text", pa.string())])
_HASHES = pa.schema([("digest", pa.uint64()), ("hashes", pa.list_(pa.uint64()))])
_BANDS = pa.schema([("key", pa.uint64()), ("text", pa.int64()), ("split", pa.int8()), ("digest", pa.uint64())])
_PAIRS = pa.schema([("first", pa.int64()), ("second", pa.int64())])
_FETCHED = pa.schema([*_PAIRS, ("hashes", pa.list_(pa.uint64()))])

SplitPairs = tuple[tuple[int, int], ...]
Text = tuple[int, bool, str]  # code of the split, is it a query, text


@dataclass(frozen=True)
class TextShards:
    """Texts to compare, numbered in the order they were given.

    Attributes:
        uri: folder; `texts/part-*.parquet` below it.
        split: int8 [N], code of each text's split.
    """

    uri: str
    split: np.ndarray
    shard_rows: int

    @property
    def shards(self) -> int:
        """How many files."""
        return -(-len(self.split) // self.shard_rows)


@dataclass(frozen=True)
class NearPairs:
    """Near duplicates among `TextShards`.

    Attributes:
        first_same: int64 [N], the first text of the same split with the same words (itself, where there is none).
        pairs: int64 [K, 2], near duplicates among the first ones, lower split first (lower number on the same split).
    """

    first_same: np.ndarray
    pairs: np.ndarray


def write_texts(texts: Iterable[Text], uri: str, shard_rows: int = SHARD_ROWS) -> TextShards:
    """Write texts as shards; memory is one shard."""
    codes: list[np.ndarray] = []
    rest = iter(texts)
    while block := list(itertools.islice(rest, shard_rows)):
        columns = {"split": [row[0] for row in block], "query": [row[1] for row in block]}
        # a lone surrogate cannot be stored; it is no word character, so replacing it changes no word
        columns["text"] = [row[2].encode("utf-8", "replace").decode() for row in block]
        write_table(pa.table(columns, TEXT_SCHEMA), part_uri(uri, "texts", len(codes)))
        codes.append(np.array(columns["split"], np.int8))
    return TextShards(uri, np.concatenate([np.zeros(0, np.int8), *codes]), shard_rows)


def near_pairs(texts: TextShards, config: NearDuplicateConfig, *, split_pairs: SplitPairs, seed: int = 1) -> NearPairs:
    """Pairs of texts whose shingle sets have a Jaccard similarity at or above the threshold.

    Args:
        texts: what to compare.
        config: threshold, permutations, shingle size.
        split_pairs: which splits are compared, the lower code first; a split with itself gives duplicates inside it.
        seed: which permutations. LSH misses 1 pair in 5,000 at 64 permutations and threshold 0.8 (the net is cast at
            half the threshold); another seed misses others.
    """
    if not len(texts.split):
        return NearPairs(np.zeros(0, np.int64), np.zeros((0, 2), np.int64))
    pairing = _Pairing(texts.uri, texts.shards, texts.shard_rows, config, split_pairs, seed)
    for task in (_sketch, _pair, _fetch, _verify):
        run_tasks(
            functools.partial(task, pairing),
            texts.shards,
            pairing.uri,
            f"shards of near duplicates ({task.__name__[1:]})",
        )
    hashed = [read_table(part_uri(pairing.uri, "hashes", shard), ["digest"]) for shard in range(pairing.shards)]
    verified = [read_table(part_uri(pairing.uri, "verified", shard)) for shard in range(pairing.shards)]
    pairs = np.stack([pa.concat_tables(verified).column(name).to_numpy() for name in _PAIRS.names], axis=1)
    first_same = _first_same(texts.split, pa.concat_tables(hashed).column("digest").to_numpy())
    for folder in ("hashes", "bands", "candidates", "fetched", "verified"):
        storage.remove(storage.join(pairing.uri, folder))
    return NearPairs(first_same, pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))])


def _first_same(split_N: np.ndarray, digest_N: np.ndarray) -> np.ndarray:
    order = np.lexsort((np.arange(len(split_N)), digest_N, split_N))
    new = np.ones(len(order), bool)
    new[1:] = (split_N[order][1:] != split_N[order][:-1]) | (digest_N[order][1:] != digest_N[order][:-1])
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first


# -- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pairing:
    uri: str
    shards: int
    shard_rows: int
    config: NearDuplicateConfig
    split_pairs: SplitPairs
    seed: int


def _parts(uri: str, *folders: str | int) -> Iterator[str]:
    folder = storage.join(uri, *map(str, folders))
    return (storage.join(folder, name) for name in storage.list_directory(folder))


def _sketch(pairing: _Pairing, shard: int) -> None:
    """Shingle hashes of a shard's texts, and its band keys, divided by key."""
    table = read_table(part_uri(pairing.uri, "texts", shard))
    hasher, shape = WordHashes(), band_shape(pairing.config.threshold / 2, pairing.config.num_perm)
    split_N = table.column("split").to_numpy()
    hashed, keys, digests = [], [], []
    for start in range(0, table.num_rows, _BATCH_TEXTS):
        words = hasher.words(table.column("text").slice(start, _BATCH_TEXTS).to_pylist())
        shingles = runs(words, pairing.config.shingle_words)
        hashed.append(pa.ListArray.from_arrays(shingles.starts.astype(np.int32), shingles.flat))
        digests.append(
            np.array(
                [xxhash.xxh3_64_intdigest(words.row(row).tobytes()) for row in range(len(words.starts) - 1)], np.uint64
            )
        )
        keys.append(band_keys(signatures(shingles, pairing.config.num_perm, pairing.seed), *shape))
    digest_N, key_NB = np.concatenate(digests), np.concatenate(keys)
    write_table(
        pa.table([pa.array(digest_N), pa.chunked_array(hashed)], schema=_HASHES), part_uri(pairing.uri, "hashes", shard)
    )
    _, first = np.unique(np.stack([split_N.astype(np.uint64), digest_N]), axis=1, return_index=True)
    first.sort()  # of equal texts on one split only the first is compared
    number_N = shard * pairing.shard_rows + first
    partition_NB = key_NB[first] % np.uint64(pairing.shards)
    for partition in range(pairing.shards):
        row, band = np.nonzero(partition_NB == partition)
        columns = [key_NB[first[row], band], number_N[row], split_N[first[row]], digest_N[first[row]]]
        write_table(
            pa.table([pa.array(column) for column in columns], schema=_BANDS),
            part_uri(pairing.uri, "bands", partition, shard),
        )


def _pair(pairing: _Pairing, partition: int) -> None:
    """Candidate pairs of one partition of the keys, divided by the shard of the first text."""
    table = pa.concat_tables([read_table(part) for part in _parts(pairing.uri, "bands", partition)])
    key, text, split, digest = (table.column(name).to_numpy() for name in _BANDS.names)
    order = np.lexsort((text, digest, split, key))
    key, text, split, digest = key[order], text[order], split[order], digest[order]
    first = np.ones(len(key), bool)  # of equal texts of one split in one band
    first[1:] = (key[1:] != key[:-1]) | (split[1:] != split[:-1]) | (digest[1:] != digest[:-1])
    key, text, split = key[first], text[first], split[first]
    allowed = np.zeros((128, 128), bool)
    for a, b in pairing.split_pairs:
        allowed[a, b] = True
    pending: list[np.ndarray] = []
    size, written = 0, 0
    place = np.arange(len(key) - 1)
    for distance in itertools.count(1):  # sorted by split inside a band, so the lower split comes first
        place = place[place + distance < len(key)]
        place = place[key[place] == key[place + distance]]
        if not len(place):
            break
        chosen = place[allowed[split[place], split[place + distance]]]
        pairs = np.stack([text[chosen], text[chosen + distance]], axis=1)
        same = split[chosen] == split[chosen + distance]
        pairs[same] = np.sort(pairs[same], axis=1)
        pending.append(pairs)
        size += len(pairs)
        if size >= _FLUSH_PAIRS:
            _write_candidates(pairing, partition, written, pending)
            pending, size, written = [], 0, written + 1
    _write_candidates(pairing, partition, written, pending)


def _write_candidates(pairing: _Pairing, partition: int, number: int, pending: list[np.ndarray]) -> None:
    pairs = _distinct(np.concatenate([np.zeros((0, 2), np.int64), *pending]))
    home = pairs[:, 0] // pairing.shard_rows
    for shard in np.unique(home):
        rows = pairs[home == shard]
        write_table(
            pa.table([rows[:, 0], rows[:, 1]], schema=_PAIRS),
            storage.join(pairing.uri, "candidates", str(shard), f"part-{partition:05d}-{number}.parquet"),
        )


def _distinct(pairs: np.ndarray) -> np.ndarray:
    """Sorted, each once."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[new]


def _fetch(pairing: _Pairing, shard: int) -> None:
    """Candidates whose first text is of this shard, with its shingles, divided by the shard of the second."""
    tables = [read_table(part) for part in _parts(pairing.uri, "candidates", shard)]
    if not tables:
        return
    table = pa.concat_tables(tables)
    pairs = _distinct(np.stack([table.column(name).to_numpy() for name in _PAIRS.names], axis=1))
    hashes = read_table(part_uri(pairing.uri, "hashes", shard), ["hashes"]).column("hashes")
    home = pairs[:, 1] // pairing.shard_rows
    for other in np.unique(home):
        rows = pairs[home == other]
        columns = [
            pa.array(rows[:, 0]),
            pa.array(rows[:, 1]),
            hashes.take(pa.array(rows[:, 0] - shard * pairing.shard_rows)),
        ]
        write_table(pa.table(columns, schema=_FETCHED), part_uri(pairing.uri, "fetched", int(other), shard))


def _verify(pairing: _Pairing, shard: int) -> None:
    """Exact Jaccard of the candidates whose second text is of this shard."""
    pairs: list[tuple[int, int]] = []
    parts = list(_parts(pairing.uri, "fetched", shard))
    own = _ragged(read_table(part_uri(pairing.uri, "hashes", shard), ["hashes"]).column("hashes")) if parts else None
    sets: dict[int, np.ndarray] = {}
    for part in parts:
        assert own is not None
        for table in iter_parquet(part, batch_rows=_BATCH_TEXTS):
            first = _ragged(table.column("hashes"))
            numbers = zip(table.column("first").to_pylist(), table.column("second").to_pylist(), strict=True)
            for row, (a, b) in enumerate(numbers):
                if b not in sets:
                    if len(sets) > _BATCH_TEXTS:
                        sets.clear()
                    sets[b] = np.unique(own.row(b - shard * pairing.shard_rows))
                if jaccard(np.unique(first.row(row)), sets[b]) >= pairing.config.threshold:
                    pairs.append((a, b))
    columns = [pa.array([pair[place] for pair in pairs], pa.int64()) for place in (0, 1)]
    write_table(pa.table(columns, schema=_PAIRS), part_uri(pairing.uri, "verified", shard))


def _ragged(column: pa.ChunkedArray | pa.Array) -> Ragged:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    starts = array.offsets.to_numpy().astype(np.int64)
    return Ragged(array.values.to_numpy(zero_copy_only=False), starts)
