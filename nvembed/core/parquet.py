"""Parquet files at any fsspec URI: the one home of reading and writing tables.

A written file appears whole or not at all (`storage.open_writer`), transient storage errors are retried, and what is
no parquet file is a `CorruptArtifactError`. Equal tables under equal `Encoding`s give equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nvembed.core import storage
from nvembed.core.retry import retried
from nvembed.core.steps import CorruptArtifactError

ROW_GROUP_ROWS = 16384


@dataclass(frozen=True)
class Encoding:
    """How the columns of a parquet file are stored.

    Attributes:
        compression: codec of every column.
        dictionary: whether repeated values are stored once.
        statistics: whether the footer has the smallest and largest value of every row group.
        columns: encoding by column path, for columns without a dictionary.
        page_checksums: whether every page carries a CRC.
    """

    compression: str = "snappy"
    dictionary: bool = True
    statistics: bool = True
    columns: Mapping[str, str] | None = None
    page_checksums: bool = False

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `pq.ParquetWriter`."""
        return {
            "compression": self.compression,
            "use_dictionary": self.dictionary,
            "write_statistics": self.statistics,
            "column_encoding": dict(self.columns) if self.columns else None,
            "write_page_checksum": self.page_checksums,
        }


DEFAULT = Encoding()


# -- writing ----------------------------------------------------------------------------------------------------------


def part_uri(uri: str, *place: str | int) -> str:
    """A numbered file below a folder: `<uri>/<folders>/part-00000.parquet`.

    Args:
        place: folders, then the number.
    """
    *folders, number = place
    return storage.join(uri, *map(str, folders), f"part-{number:05d}.parquet")


@retried
def write_table(
    table: pa.Table, uri: str, *, row_group_rows: int = ROW_GROUP_ROWS, encoding: Encoding = DEFAULT
) -> None:
    """Write a table as one parquet file."""
    with storage.open_writer(uri) as file:
        pq.write_table(table, file, row_group_size=row_group_rows, **encoding.options())


def table_bytes(table: pa.Table, *, row_group_rows: int = ROW_GROUP_ROWS, encoding: Encoding = DEFAULT) -> bytes:
    """A table as the bytes of a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=row_group_rows, **encoding.options())
    return buffer.getvalue()


class TableWriter:
    """Writer of a parquet file, table after table, each a row group of it.

    Args:
        file: open for writing; the caller closes it after this.
        schema: of every table.
    """

    def __init__(self, file: IO[bytes], schema: pa.Schema, encoding: Encoding = DEFAULT) -> None:
        self.schema = schema
        self._writer = pq.ParquetWriter(file, schema, **encoding.options())

    def write(self, table: pa.Table) -> None:
        """Add a row group."""
        self._writer.write_table(table, row_group_size=max(table.num_rows, 1))

    def close(self) -> None:
        """Write the footer: without it the file is none."""
        self._writer.close()


@retried
def write_tables(
    tables: Callable[[], Iterable[pa.Table]], schema: pa.Schema, uri: str, encoding: Encoding = DEFAULT
) -> int:
    """Write one parquet file, each table a row group of it; the same bytes as `write_table` of all rows.

    Args:
        tables: gives them from the first one on each time it is called: once for every attempt to write.

    Returns:
        The number of rows.
    """
    rows = 0
    with storage.open_writer(uri) as file, closing(TableWriter(file, schema, encoding)) as writer:
        for table in tables():
            writer.write(table)
            rows += table.num_rows
    return rows


def even_tables(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """A stream of tables in others of `rows` rows each, the last one shorter, wherever the tables end."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        while count >= rows:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, rows).combine_chunks()
            waiting, count = [whole.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(waiting).combine_chunks()


# -- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """A parquet file, open for reading inside the `with` block.

    Raises:
        CorruptArtifactError: the file is missing or is no parquet file.
    """
    try:
        file = storage.open_reader(uri)
    except FileNotFoundError as error:
        raise _unreadable(uri, error) from error
    with file:
        try:
            yield pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise _unreadable(uri, error) from error


def _unreadable(uri: str, error: Exception) -> CorruptArtifactError:
    return CorruptArtifactError(f"{uri} cannot be read ({error}). Build its artifact again.")


@retried
def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one parquet file; with the column `vector` comes the `scale` that int8 vectors need.

    Raises:
        CorruptArtifactError: the file is missing, is no parquet file or lacks a column.
    """
    with open_parquet(uri) as file:
        return file.read(columns=_checked(file, uri, columns))


def parse_table(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in the bytes of a parquet file."""
    return pq.read_table(pa.BufferReader(data), columns=None if columns is None else list(columns))


@retried
def read_where(
    uri: str, condition: pc.Expression | None, columns: Sequence[str] | None = None, *, check_pages: bool = False
) -> pa.Table:
    """Rows of one parquet file that meet a condition; row groups are passed over by their statistics.

    Args:
        condition: None for all rows.
        check_pages: compare the CRC of every page that is read (`Encoding.page_checksums`).

    Raises:
        FileNotFoundError: the file is missing.
        OSError: a page has another CRC.
        pa.ArrowInvalid: it is no parquet file.
    """
    names = None if columns is None else list(columns)
    with storage.open_reader(uri) as file:
        return pq.read_table(file, columns=names, filters=condition, page_checksum_verification=check_pages)


@retried
def read_slice(uri: str, start: int, count: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Some rows of one parquet file; only the row groups that hold them are read."""
    with open_parquet(uri) as file:
        groups: list[int] = []
        first = before = 0
        for group, rows in enumerate(_group_rows(file)):
            if before < start + count and before + rows > start:
                first = first if groups else before
                groups.append(group)
            before += rows
        return file.read_row_groups(groups, columns=_checked(file, uri, columns)).slice(start - first, count)


def iter_parquet(uri: str, columns: Sequence[str] | None = None, batch_rows: int = 4096) -> Iterator[pa.Table]:
    """Stream a parquet file as tables of at most `batch_rows` rows, in order."""
    with open_parquet(uri) as file:
        for batch in file.iter_batches(batch_size=batch_rows, columns=_checked(file, uri, columns)):
            yield pa.Table.from_batches([batch])


def _checked(file: pq.ParquetFile, uri: str, columns: Sequence[str] | None) -> list[str] | None:
    """The columns to read; pyarrow passes over names that the file lacks."""
    if columns is None:
        return None
    names = file.schema_arrow.names
    if missing := [name for name in columns if name not in names]:
        raise CorruptArtifactError(f"{uri} has no column {', '.join(missing)}. Build its artifact again.")
    return [*columns, "scale"] if "vector" in columns and "scale" in names and "scale" not in columns else [*columns]


# -- footers ----------------------------------------------------------------------------------------------------------


@retried
def read_schema(uri: str) -> pa.Schema:
    """Schema of one parquet file, with its metadata; only the footer is read."""
    with open_parquet(uri) as file:
        return file.schema_arrow


@retried
def count_rows(uri: str) -> int:
    """Rows of a parquet file; only the footer is read."""
    with open_parquet(uri) as file:
        return int(file.metadata.num_rows)


@retried
def group_rows(uri: str) -> list[int]:
    """Rows of each row group of a parquet file; only the footer is read."""
    with open_parquet(uri) as file:
        return _group_rows(file)


def _group_rows(file: pq.ParquetFile) -> list[int]:
    return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


@retried
def column_size(uri: str, column: str) -> tuple[int, int]:
    """Rows of a parquet file, and bytes of one of its columns before compression; only the footer is read."""
    with open_parquet(uri) as file:
        metadata = file.metadata
    place = _column_place(metadata, column)
    groups = range(metadata.num_row_groups)
    return metadata.num_rows, sum(metadata.row_group(group).column(place).total_uncompressed_size for group in groups)


def _column_place(metadata: pq.FileMetaData, column: str) -> int:
    """Number of a flat column among the leaves of the schema; nested columns have several."""
    return [metadata.schema.column(number).path for number in range(len(metadata.schema))].index(column)


@retried
def list_shards(uri: str) -> list[str]:
    """Relative names of all `part-*.parquet` under a directory (any depth), sorted."""
    if not storage.exists(uri):
        return []
    names = storage.files_below(uri)
    return [name for name in names if name.rsplit("/", 1)[-1].startswith("part-") and name.endswith(".parquet")]


# -- rows by key ------------------------------------------------------------------------------------------------------


@retried
def read_rows(uri: str, key: str, wanted: Iterable[Any] | pa.Array, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a parquet file whose `key` is among `wanted`, in file order; memory is one row group plus the result.

    Args:
        uri: where the file lies.
        key: column to compare.
        wanted: keys, in any order; those the file lacks give no row.
        columns: columns of the result; all by default.
    """
    values = wanted if isinstance(wanted, pa.Array) else None
    with open_parquet(uri) as file:
        names = _checked(file, uri, columns) or file.schema_arrow.names
        if values is None:
            values = pa.array(sorted(set(wanted)), file.schema_arrow.field(key).type)
        none = file.schema_arrow.empty_table().select(names)
        return pa.concat_tables([none, *matching_rows(file, key, values, names)])


def matching_rows(
    file: pq.ParquetFile, key: str, wanted: pa.Array, columns: Sequence[str], groups: Iterable[int] | None = None
) -> Iterator[pa.Table]:
    """The rows of each row group whose `key` is among `wanted`, in file order; nothing for a row group that has none.

    The keys of a row group are read first, its other columns only where one is wanted: selecting by a filter of
    `pyarrow.dataset` reads all columns of every row group.

    Args:
        wanted: keys, of the type of the column or one it casts to.
        groups: row groups to look in; all by default.
    """
    for group in (range(file.num_row_groups) if groups is None else groups) if len(wanted) else ():
        keys = file.read_row_group(group, [key]).column(key)
        hit = pc.is_in(keys if keys.type == wanted.type else keys.cast(wanted.type), value_set=wanted)
        if pc.any(hit).as_py():
            yield file.read_row_group(group, list(columns)).filter(hit)
