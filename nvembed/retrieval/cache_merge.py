"""Merging of a vector cache's small parts into large ones, so that a look-up does not slow down with every addition.

A merged part is a part like any other; its metadata names the parts it was made from and where their rows are. It is
written before they are deleted. A process that knows a merged part by its old name reads its rows there, so a run that
is resumed, or runs during the merging, sees the same parts as before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pyarrow as pa
import xxhash

from nvembed.core import storage
from nvembed.core.parquet import parse_table, read_schema
from nvembed.core.retry import retried
from nvembed.core.vectors import shard_content

logger = logging.getLogger(__name__)

_READERS = 16
SMALL_BYTES, MANY = 1 << 20, 64  # so many parts of fewer bytes are merged
MERGED_BYTES = 32 << 20
_MADE_OF = b"nvembed.merged_from"  # [[name, first row, rows], ...]

Section = tuple[str, int, int]  # name of a part, first row, rows


def list_parts(uri: str) -> list[str]:
    """Names of the parts in a directory, sorted."""
    names = storage.list_directory(uri)
    return [name for name in names if name.startswith("part-") and name.endswith(".parquet")]


def readers(uri: str) -> ThreadPoolExecutor:
    """Threads that read parts: many for a remote store, where each read waits; one for a disk."""
    return ThreadPoolExecutor(1 if storage.is_local(uri) else _READERS)


def part_name(data: bytes) -> str:
    """The name of a part: the hash of its bytes."""
    return f"part-{xxhash.xxh3_128_hexdigest(data)}.parquet"


def read_part(uri: str, name: str) -> pa.Table:
    """A part, its bytes checked against its name.

    Raises:
        ValueError: they do not fit. FileNotFoundError: it is not there; see `sections`.
    """
    data = storage.read_bytes(storage.join(uri, name))
    if name != part_name(data):
        raise ValueError("its bytes changed")
    return parse_table(data)


def sections(uri: str) -> dict[str, Section]:
    """Parts that were merged -> (the part they are in, first row, rows)."""

    def made_of(name: str) -> list[tuple[str, Section]]:
        try:
            made_from = (read_schema(storage.join(uri, name)).metadata or {}).get(_MADE_OF)
        except (pa.ArrowException, OSError, ValueError):
            return []
        return (
            []
            if made_from is None
            else [(source, (name, first, rows)) for source, first, rows in json.loads(made_from)]
        )

    with readers(uri) as pool:
        return dict(pair for pairs in pool.map(made_of, list_parts(uri)) for pair in pairs)


def merge_small(uri: str) -> int:
    """Merge the small parts of one fingerprint's directory where there are many; returns how many were.

    A part that cannot be read is left where it is.
    """
    sizes = _sizes(uri)
    small = [name for name in list_parts(uri) if sizes.get(name, SMALL_BYTES) < SMALL_BYTES]
    if len(small) < MANY:
        return 0
    merged = sections(uri)
    done = [name for name in small if name in merged]  # an earlier merging was stopped before it deleted them
    made = 0
    for group in _groups(_tables(uri, [name for name in small if name not in merged]), sizes):
        if len(group) > 1:
            _write(uri, group, merged)
            done += [name for name, _ in group]
            made += 1
    for name in done:
        with suppress(FileNotFoundError):  # another process merges too
            storage.remove(storage.join(uri, name))
    logger.info("vector cache: %d small parts are %d now", len(done), made)
    return len(done)


@retried
def _sizes(uri: str) -> dict[str, int]:
    """Name -> bytes of the files directly under a URI, by one listing; empty if it does not exist."""
    fs, path = storage.filesystem(uri)
    fs.invalidate_cache()
    if not fs.exists(path):
        return {}
    files = (item for item in fs.ls(path, detail=True) if item["type"] == "file")
    return {str(item["name"]).rsplit("/", 1)[-1]: int(item["size"]) for item in files}


def _tables(uri: str, names: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    def read(name: str) -> pa.Table | None:
        try:
            return read_part(uri, name)
        except (pa.ArrowException, OSError, ValueError):
            return None  # reported when it is opened

    with readers(uri) as pool:
        for start in range(0, len(names), MANY):
            some = names[start : start + MANY]
            yield from ((name, table) for name, table in zip(some, pool.map(read, some), strict=True) if table)


def _groups(tables: Iterable[tuple[str, pa.Table]], sizes: Mapping[str, int]) -> Iterator[list[tuple[str, pa.Table]]]:
    """Parts of the same columns (older ones have fewer) that together have about `MERGED_BYTES`."""
    waiting: dict[tuple[str, ...], list[tuple[str, pa.Table]]] = {}
    for name, table in tables:
        group = waiting.setdefault(tuple(table.schema.names), [])
        group.append((name, table))
        if sum(sizes[each] for each, _ in group) >= MERGED_BYTES:
            yield waiting.pop(tuple(table.schema.names))
    yield from waiting.values()


def _write(uri: str, group: Sequence[tuple[str, pa.Table]], merged: dict[str, Section]) -> None:
    """One part from several. Of a part that was itself merged, its sources are named too."""
    inner: dict[str, list[tuple[str, int, int]]] = {}
    for source, (name, first, rows) in merged.items():
        inner.setdefault(name, []).append((source, first, rows))
    made_of: list[tuple[str, int, int]] = []
    start = 0
    for name, table in group:
        made_of.append((name, start, len(table)))
        made_of += [(source, start + first, rows) for source, first, rows in inner.get(name, [])]
        start += len(table)
    whole = pa.concat_tables([table.replace_schema_metadata(None) for _, table in group]).combine_chunks()
    data = shard_content(whole.replace_schema_metadata({_MADE_OF: json.dumps(made_of)}), checksums=True)
    storage.write_bytes(storage.join(uri, part_name(data)), data)
