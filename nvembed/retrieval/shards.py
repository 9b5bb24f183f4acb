"""Text shards and vector shards: parquet files `part-00000.parquet`, ... under a directory, in order.

A text shard has `key, text, instruction` (and columns of its writer's own); the vector shard made from it stands under
the same relative name and has `key, vector` with `vector` a FixedSizeList<float32>. All functions hold one shard at a
time. Reading goes through fsspec, so a directory may be any URI.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nvembed import storage

MIN_SHARDS = 8  # small inputs are still cut into this many, so that several actors have work whatever their number
TEXT_SCHEMA = pa.schema([("key", pa.string()), ("text", pa.string()), ("instruction", pa.string())])


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
    buffer = io.BytesIO()
    vectors = any(pa.types.is_fixed_size_list(field.type) for field in table.schema)
    # Embeddings do not compress; dictionaries and statistics of them only cost time.
    pq.write_table(
        table,
        buffer,
        compression="none" if vectors else "zstd",
        use_dictionary=not vectors,
        write_statistics=not vectors,
        row_group_size=max(table.num_rows, 1),
    )
    storage.write_bytes(uri, buffer.getvalue())


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read one parquet file."""
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        return pq.read_table(file, columns=columns)


def read_schema(uri: str) -> pa.Schema:
    """Schema of one parquet file, with its metadata."""
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        return pq.read_schema(file)


def iter_parquet(uri: str, columns: list[str] | None = None, batch_rows: int = 4096) -> Iterator[pa.Table]:
    """Stream a parquet file as tables of at most `batch_rows` rows, in order."""
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
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


def vector_table(keys: pa.Array | pa.ChunkedArray, matrix_ND: np.ndarray) -> pa.Table:
    """Table `key, vector` from float32 [N, D], without going through Python lists."""
    flat = pa.array(np.ascontiguousarray(matrix_ND, dtype=np.float32).reshape(-1))
    vectors = pa.FixedSizeListArray.from_arrays(flat, matrix_ND.shape[1])
    return pa.table({"key": keys, "vector": vectors})


def table_matrix(table: pa.Table, column: str = "vector") -> np.ndarray:
    """float32 [N, D] of a FixedSizeList column."""
    vectors = table.column(column).combine_chunks()
    if isinstance(vectors, pa.ChunkedArray):
        vectors = vectors.chunk(0) if vectors.num_chunks else pa.array([], type=vectors.type)
    return np.asarray(vectors.flatten().to_numpy(zero_copy_only=False)).reshape(len(vectors), vectors.type.list_size)


def iter_vectors(uri: str, names: list[str] | None = None) -> Iterator[tuple[list[str], np.ndarray]]:
    """Stream `(keys, float32 [N, D])` of a directory of vector shards in order, one shard in memory at a time."""
    for name in list_shards(uri) if names is None else names:
        table = read_table(storage.join(uri, name), ["key", "vector"])
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
        raise storage.UserError(f"{uri} holds no vectors (no part-*.parquet). Encode the texts first.")
    return keys, np.concatenate(parts)
