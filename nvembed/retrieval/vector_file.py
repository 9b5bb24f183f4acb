"""Files of vectors: parquet with `id` and `vector`, or npy in the order of the texts.

A file appears when it is complete, and never in part.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from nvembed.core import storage
from nvembed.types import UserError

SUFFIXES = (".parquet", ".npy")
READ_ROWS = 2048  # vectors read at once


@contextmanager
def publish_file(target: str) -> Iterator[IO[bytes]]:
    """A file that becomes `target` when the block ends well, and is gone when it does not."""
    local = storage.is_local(target)
    folder = storage.local_path(target).parent if local else Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{target.rsplit('/', 1)[-1]}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if local:
            os.replace(part, storage.local_path(target))
        else:
            fs, path = storage.filesystem(target)
            fs.put_file(str(part), path)
    finally:
        part.unlink(missing_ok=True)


def vector_writer(kind: str, file: IO[bytes], rows: int, dim: int) -> _ParquetWriter | _NpyWriter:
    """A writer of blocks `(ids, float32 [N, dim])`, `rows` in all, to a file of this suffix."""
    return _ParquetWriter(file, dim) if kind == ".parquet" else _NpyWriter(file, rows, dim)


class _ParquetWriter:
    """Columns `id` (string) and `vector` (FixedSizeList<float32>), one row group per block."""

    def __init__(self, file: IO[bytes], dim: int) -> None:
        import pyarrow as pa

        from nvembed.core.parquet import Encoding, TableWriter

        schema = pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), dim))])
        self._writer = TableWriter(file, schema, Encoding(compression="none", dictionary=False))

    def write(self, ids: Sequence[str], matrix_ND: np.ndarray) -> None:
        import pyarrow as pa

        flat = pa.array(np.ascontiguousarray(matrix_ND, dtype=np.float32).reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(flat, matrix_ND.shape[1])
        self._writer.write(pa.table([pa.array(ids, pa.string()), vectors], schema=self._writer.schema))

    def close(self) -> None:
        self._writer.close()


class _NpyWriter:
    """float32 [N, dim] in the input's order, written block after block."""

    def __init__(self, file: IO[bytes], rows: int, dim: int) -> None:
        self._file = file
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)}
        np.lib.format.write_array_header_1_0(file, header)

    def write(self, ids: Sequence[str], matrix_ND: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(matrix_ND, dtype="<f4").tobytes())

    def close(self) -> None:
        """Nothing is left to write."""


def iter_vector_file(uri: str) -> Iterator[tuple[list[str] | None, np.ndarray]]:
    """`(ids, float32 [N, D])` of a file that `nvembed embed` wrote, block by block; an npy file has no ids (None).

    Raises:
        UserError: there is no such file, or it is none that `nvembed embed` wrote.
    """
    if not storage.exists(uri):
        raise UserError(f"--vectors {uri}: no such file.")
    if uri.endswith(".npy"):
        if not storage.is_local(uri):
            raise UserError(f"--vectors {uri}: an npy file must be local; use parquet")
        matrix_ND = np.load(Path(storage.local_path(uri)), mmap_mode="r", allow_pickle=False)
        for start in range(0, len(matrix_ND), READ_ROWS):
            yield None, np.asarray(matrix_ND[start : start + READ_ROWS], dtype=np.float32)
        return
    import pyarrow as pa

    from nvembed.core.parquet import iter_parquet
    from nvembed.core.steps import CorruptArtifactError
    from nvembed.core.vectors import table_matrix

    try:
        for table in iter_parquet(uri, ["id", "vector"], READ_ROWS):
            yield table.column("id").to_pylist(), table_matrix(table)
    except (CorruptArtifactError, pa.ArrowException, KeyError) as error:
        raise UserError(f"--vectors {uri}: not a file that `nvembed embed` wrote ({error}).") from error
