"""Text shards and vector shards: parquet files `part-00000.parquet`, ... under a directory, in order.

A text shard has `key, text, instruction` (and columns of its writer's own); the vector shard made from it stands under
the same relative name and has `key, vector`, `vector` being a fixed-size list. How its numbers are stored:

    fp32  float                                     fp16  halffloat
    bf16  uint16, the upper half of a float's bits; the field says so in its metadata (Arrow has no bfloat16)
    int8  int8 times the row's number in the column `scale` (float), the row's largest number being 127

Readers give float32 back whatever is stored. Parquet has no integers below 32 bits, so these are packed by its
encodings (measured on unit vectors of 384 numbers: 1.14 bytes a number for int8, 1.4-2 for bf16). All functions hold
one shard at a time. Reading goes through fsspec, so a directory may be any URI.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nvembed.core import storage
from nvembed.core.retry import retried
from nvembed.types import UserError, VectorType

_KIND = b"nvembed.kind"
_ENCODINGS = {"bf16": "BYTE_STREAM_SPLIT", "int8": "DELTA_BINARY_PACKED"}
MIN_SHARDS = 8  # small inputs are still cut into this many, so that several actors have work whatever their number
TEXT_SCHEMA = pa.schema([("key", pa.string()), ("text", pa.string()), ("instruction", pa.string())])


@retried
def list_shards(uri: str) -> list[str]:
    """Relative names of all `part-*.parquet` under a directory (any depth), sorted."""
    fs, root = storage.filesystem(uri)
    fs.invalidate_cache()
    if not fs.exists(root):
        return []
    prefix = root.rstrip("/") + "/"
    names = [str(path)[len(prefix) :] for path in fs.find(root)]
    return sorted(name for name in names if name.rsplit("/", 1)[-1].startswith("part-") and name.endswith(".parquet"))


def write_table(table: pa.Table, uri: str) -> None:
    """Write one parquet file atomically. Equal tables give equal bytes."""
    storage.write_bytes(uri, table_bytes(table))


def table_bytes(table: pa.Table, *, checksums: bool = False) -> bytes:
    """A table as the bytes of a parquet file of one row group; `checksums`: of every page."""
    buffer = io.BytesIO()
    vectors = {field.name: _kind(field) for field in table.schema if pa.types.is_fixed_size_list(field.type)}
    # Embeddings do not compress, only the split bytes of bf16 do; dictionaries and statistics of them only cost time.
    compression = "zstd" if not vectors or "bf16" in vectors.values() else "none"
    encodings = {f"{name}.list.element": _ENCODINGS[kind] for name, kind in vectors.items() if kind in _ENCODINGS}
    pq.write_table(
        table,
        buffer,
        compression=compression,
        use_dictionary=not vectors,
        write_statistics=not vectors,
        column_encoding=encodings or None,
        row_group_size=max(table.num_rows, 1),
        write_page_checksum=checksums,
    )
    return buffer.getvalue()


@retried
def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read one parquet file; with `vector` comes the `scale` that int8 vectors need."""
    with storage.open_reader(uri) as file:
        opened = pq.ParquetFile(file)
        if columns is not None and "vector" in columns and "scale" in opened.schema_arrow.names:
            columns = [*columns, "scale"]
        return opened.read(columns=columns)


@retried
def read_slice(uri: str, start: int, count: int, columns: list[str] | None = None) -> pa.Table:
    """Some rows of one parquet file; only the row groups that hold them are read."""
    with storage.open_reader(uri) as file:
        opened = pq.ParquetFile(file)
        groups: list[int] = []
        first = before = 0
        for group in range(opened.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            if before < start + count and before + rows > start:
                first = first if groups else before
                groups.append(group)
            before += rows
        return opened.read_row_groups(groups, columns=columns).slice(start - first, count)


def read_schema(uri: str) -> pa.Schema:
    """Schema of one parquet file, with its metadata."""
    with storage.open_reader(uri) as file:
        return pq.read_schema(file)


@retried
def column_size(uri: str, column: str) -> tuple[int, int]:
    """Rows of a parquet file, and bytes of one of its columns before compression; only the footer is read."""
    with storage.open_reader(uri) as file:
        metadata = pq.read_metadata(file)
    place = [metadata.schema.column(number).path for number in range(len(metadata.schema))].index(column)
    groups = range(metadata.num_row_groups)
    return metadata.num_rows, sum(metadata.row_group(group).column(place).total_uncompressed_size for group in groups)


def iter_parquet(uri: str, columns: list[str] | None = None, batch_rows: int = 4096) -> Iterator[pa.Table]:
    """Stream a parquet file as tables of at most `batch_rows` rows, in order."""
    with storage.open_reader(uri) as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=batch_rows, columns=columns):
            yield pa.Table.from_batches([batch])


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
        write_table(table, storage.join(uri, f"part-{written:05d}.parquet"))
        written += 1
        total += table.num_rows
    for name in list_shards(uri):
        if name >= f"part-{written:05d}.parquet":
            storage.remove(storage.join(uri, name))
    return total


def _recut(tables: Iterable[pa.Table], shard_rows: int) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    count, long = 0, False
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        if not long and count < MIN_SHARDS * shard_rows:
            continue
        long = True
        whole = pa.concat_tables(waiting).combine_chunks()
        full = count - count % shard_rows
        for start in range(0, full, shard_rows):
            yield whole.slice(start, shard_rows)
        waiting, count = [whole.slice(full)], count - full
    if count == 0:
        return
    whole = pa.concat_tables(waiting).combine_chunks()
    pieces = -(-count // shard_rows) if long else min(MIN_SHARDS, count)
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
