"""Text shards and vector shards: parquet files `part-00000.parquet`, ... under a directory, in order.

A text shard has `key, text, instruction` (and columns of its writer's own); the vector shard made from it lies under
the same relative name and has `key, vector`, `vector` being a fixed-size list. How its numbers are stored:

    fp32  float                                     fp16  halffloat
    bf16  uint16, the upper half of a float's bits; the field says so in its metadata (Arrow has no bfloat16)
    int8  int8 times the row's number in the column `scale` (float), the row's largest number being 127

Readers give float32 back whatever is stored. Parquet has no integers below 32 bits, so these are packed by its
encodings (measured on unit vectors of 384 numbers: 1.14 bytes a number for int8, 1.4-2 for bf16). All functions hold
one shard at a time. Reading goes through fsspec, so a directory may be any URI.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa

from nvembed.core import storage
from nvembed.core.parquet import Encoding, even_tables, list_shards, part_uri, read_table, table_bytes
from nvembed.types import UserError, VectorType

_KIND = b"nvembed.kind"
_ENCODINGS = {"bf16": "BYTE_STREAM_SPLIT", "int8": "DELTA_BINARY_PACKED"}
MIN_SHARDS = 8  # small inputs are still cut into this many, so that several actors have work whatever their number
TEXT_SCHEMA = pa.schema([("key", pa.string()), ("text", pa.string()), ("instruction", pa.string())])


def write_shard(table: pa.Table, uri: str) -> None:
    """Write one shard: a parquet file of one row group. Equal tables give equal bytes."""
    storage.write_bytes(uri, shard_content(table))


def shard_content(table: pa.Table, *, checksums: bool = False) -> bytes:
    """The bytes of a shard's file; `checksums`: with a CRC in every page."""
    encoding = replace(_encoding(table.schema), page_checksums=checksums)
    return table_bytes(table, row_group_rows=max(table.num_rows, 1), encoding=encoding)


def _encoding(schema: pa.Schema) -> Encoding:
    """Embeddings do not compress, only the split bytes of bf16 do; dictionaries and statistics of them cost time."""
    vectors = {field.name: _kind(field) for field in schema if pa.types.is_fixed_size_list(field.type)}
    return Encoding(
        compression="zstd" if not vectors or "bf16" in vectors.values() else "none",
        dictionary=not vectors,
        statistics=not vectors,
        columns={f"{name}.list.element": _ENCODINGS[kind] for name, kind in vectors.items() if kind in _ENCODINGS},
    )


def write_text_shards(rows: Iterable[tuple[str, str, str]], uri: str, shard_rows: int) -> int:
    """Write (key, text, instruction) rows as text shards, in order.

    Inputs shorter than `MIN_SHARDS * shard_rows` are cut into `MIN_SHARDS` even shards, so that every actor of a small
    pool has work. Where shards end depends on the rows alone, never on the number of actors.

    Returns:
        The number of rows.
    """

    def tables() -> Iterator[pa.Table]:
        iterator = iter(rows)
        while chunk := list(itertools.islice(iterator, shard_rows)):
            yield pa.Table.from_pylist(
                [dict(zip(TEXT_SCHEMA.names, row, strict=True)) for row in chunk], schema=TEXT_SCHEMA
            )

    return write_shard_tables(tables(), uri, shard_rows)


def write_shard_tables(tables: Iterable[pa.Table], uri: str, shard_rows: int) -> int:
    """Cut a stream of tables (at least `key, text, instruction`) into shards; see `write_text_shards`.

    Shards of an earlier, longer run in the same directory are removed.
    """
    written, total = 0, 0
    for table in _recut(tables, shard_rows):
        write_shard(table, part_uri(uri, written))
        written += 1
        total += table.num_rows
    for name in list_shards(uri):
        if storage.join(uri, name) >= part_uri(uri, written):
            storage.remove(storage.join(uri, name))
    return total


def _recut(tables: Iterable[pa.Table], shard_rows: int) -> Iterator[pa.Table]:
    tables, first, count = iter(tables), [], 0
    for table in tables:
        first.append(table)
        count += table.num_rows
        if count >= MIN_SHARDS * shard_rows:
            taken = (first.pop(0) for _ in range(len(first)))  # not kept while the others are cut
            yield from even_tables(itertools.chain(taken, tables), shard_rows)
            return
    if count == 0:
        return
    whole = pa.concat_tables(first).combine_chunks()
    pieces = min(MIN_SHARDS, count)
    edges = [count * index // pieces for index in range(pieces + 1)]
    for start, end in itertools.pairwise(edges):
        yield whole.slice(start, end - start)


def vector_table(keys: pa.Array | pa.ChunkedArray, matrix_ND: np.ndarray, kind: VectorType = "fp32") -> pa.Table:
    """Table `key, vector` (and `scale` for int8) from float32 [N, D], without going through Python lists.

    Rounding is to the nearest number (ties to even); vectors must be finite.
    """
    matrix_ND = np.ascontiguousarray(matrix_ND, dtype=np.float32)
    columns: dict[str, pa.Array] = {}
    metadata = None
    if kind == "fp32":
        stored_ND = matrix_ND
    elif kind == "fp16":
        stored_ND = matrix_ND.astype(np.float16)
    elif kind == "bf16":
        bits_ND = matrix_ND.view(np.uint32)
        stored_ND = ((bits_ND + 0x7FFF + ((bits_ND >> 16) & 1)) >> 16).astype(np.uint16)
        metadata = {_KIND: b"bf16"}
    else:
        largest_N = np.abs(matrix_ND).max(axis=1, initial=0.0)
        scale_N = np.where(largest_N > 0, largest_N / np.float32(127), np.float32(1)).astype(np.float32)
        stored_ND = np.rint(matrix_ND / scale_N[:, None]).astype(np.int8)
        columns["scale"] = pa.array(scale_N)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(stored_ND.reshape(-1)), matrix_ND.shape[1])
    fields = [
        pa.field("key", keys.type),
        pa.field("vector", vectors.type, metadata=metadata),
        *(pa.field(name, column.type) for name, column in columns.items()),
    ]
    return pa.table([keys, vectors, *columns.values()], schema=pa.schema(fields))


def table_matrix(table: pa.Table, column: str = "vector") -> np.ndarray:
    """float32 [N, D] of a column of vectors, however they are stored.

    Raises:
        UserError: numbers of a type that `vector_table` does not write.
    """
    field = table.schema.field(column)
    kind = _kind(field)
    vectors = table.column(column).combine_chunks()
    if isinstance(vectors, pa.ChunkedArray):
        vectors = vectors.chunk(0) if vectors.num_chunks else pa.array([], type=vectors.type)
    flat = np.asarray(vectors.flatten().to_numpy(zero_copy_only=False))
    if kind == "bf16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    matrix_ND: np.ndarray = flat.reshape(len(vectors), field.type.list_size).astype(np.float32, copy=False)
    if kind == "int8":
        matrix_ND = matrix_ND * np.asarray(table.column("scale"), dtype=np.float32)[:, None]
    return matrix_ND


def _kind(field: pa.Field) -> str:
    value = field.type.value_type
    if pa.types.is_uint16(value) and (field.metadata or {}).get(_KIND) == b"bf16":
        return "bf16"
    known = {pa.float32(): "fp32", pa.float64(): "fp64", pa.float16(): "fp16", pa.int8(): "int8"}
    if value not in known:
        raise UserError(f"column {field.name!r} holds lists of {value}, which are no vectors nvembed knows.")
    return known[value]


def iter_vectors(uri: str, names: list[str] | None = None) -> Iterator[tuple[list[str], np.ndarray]]:
    """Stream `(keys, float32 [N, D])` of a directory of vector shards in order, one shard in memory at a time."""
    for name in list_shards(uri) if names is None else names:
        table = read_table(storage.join(uri, name))
        yield table.column("key").to_pylist(), table_matrix(table)


def read_vectors(uri: str) -> tuple[list[str], np.ndarray]:
    """All keys and vectors of a directory; only for sets that fit in memory.

    Raises:
        UserError: there is no vector shard.
    """
    keys: list[str] = []
    parts = []
    for shard_keys, matrix in iter_vectors(uri):
        keys += shard_keys
        parts.append(matrix)
    if not parts:
        raise UserError(f"{uri} holds no vectors (no part-*.parquet). Encode the texts first.")
    return keys, np.concatenate(parts)
