"""jsonl, csv and parquet files of (query, positives, negatives) rows at any fsspec URI."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import IO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from nvembed import storage
from nvembed.data.config import FilesSource
from nvembed.data.sources.base import SourceRows
from nvembed.data.sources.rows import (
    RawRow,
    check_columns,
    pairs_to_rows,
    read_pairs,
    require_every_split,
    rows_of_records,
)
from nvembed.storage import UserError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
ADVICE = "Give more rows or raise test_share; rows that share a query or a positive cannot be divided."


def read_files(config: FilesSource) -> SourceRows:
    """Read every file (`*` in a URI lists many).

    Raises:
        UserError: a file is missing, of another kind, or its columns are of neither shape; a side stays empty.
    """
    table = read_pairs(row for uri in config.uris for file in _expand(uri) for row in read_file(file))
    rows = pairs_to_rows(table, config.name, config.test_share, config.licence)
    if rows.rejects.total < rows.rejects.rows:  # a file without one good row is refused for that, not for its sides
        require_every_split(rows, config.name, ADVICE)
    return rows


def _expand(uri: str) -> list[str]:
    """URIs of the files a pattern names."""
    fs, path = storage.filesystem(uri)
    if not any(character in path for character in "*?["):
        if not fs.exists(path):
            raise UserError(f"{uri}: no such file. Give the uris of a files source as paths or fsspec URIs.")
        return [uri]
    found = sorted(str(name) for name in fs.glob(path))
    if not found:
        raise UserError(f"{uri}: the pattern matches no file.")
    return [fs.unstrip_protocol(name) for name in found]


def read_file(uri: str) -> Iterator[RawRow]:
    """Rows of one file, in order, one at a time; `.gz` and the like are opened by their ending.

    Raises:
        UserError: unknown kind of file, or (csv, parquet) columns of neither shape.
    """
    name = uri.rsplit("/", 1)[-1]
    base = uri.removesuffix(".gz").removesuffix(".xz").removesuffix(".bz2")
    if base.endswith((".jsonl", ".json")):
        with fsspec.open(uri, "rb", compression="infer") as file:
            yield from json_lines(file, name)
    elif base.endswith(".csv"):
        with fsspec.open(uri, "rb", compression="infer") as file:
            yield from _csv_rows(file, name)
    elif base.endswith(".parquet"):
        with fsspec.open(uri, "rb") as file:
            yield from _parquet_rows(file, name)
    else:
        raise UserError(f"{uri}: unknown kind of file. Known endings: {', '.join(FORMATS)} (jsonl and csv also .gz).")


def json_lines(file: IO[bytes], name: str) -> Iterator[RawRow]:
    """One JSON object a line; blank lines are skipped, not counted."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield RawRow(name, number, None, "not UTF-8")
        except (ValueError, RecursionError):
            yield RawRow(name, number, None, "not JSON")
        else:
            problem = "" if isinstance(value, dict) else "not a JSON object"
            yield RawRow(name, number, None if problem else value, problem)


def _csv_rows(file: IO[bytes], name: str) -> Iterator[RawRow]:
    """Rows of a csv file with a header; broken bytes become surrogates, which `parse_row` refuses."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.DictReader(text, strict=True)
    check_columns(reader.fieldnames or (), name)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield RawRow(name, reader.line_num, None, "not CSV")
            continue
        if None in row:
            yield RawRow(name, reader.line_num, None, "more fields than the header")
        else:
            yield RawRow(name, reader.line_num, row)


def _parquet_rows(file: IO[bytes], name: str) -> Iterator[RawRow]:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{name} is not a parquet file, or cut short ({error}).") from error
    check_columns(parquet.schema_arrow.names, name)
    yield from rows_of_records((row for batch in parquet.iter_batches(8192) for row in batch.to_pylist()), name)
