"""jsonl, csv, tsv and parquet files of rows at any fsspec URI, compressed ones by their ending; folders of them."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from nvembed.core import storage
from nvembed.core.lines import MAX_LINE_BYTES, bounded_lines
from nvembed.core.retry import retried
from nvembed.data.config import FilesSource, RowSource
from nvembed.data.sources.base import SourceRows
from nvembed.data.sources.labelled import (
    check_graded_columns,
    check_labelled_columns,
    graded_to_rows,
    labelled_to_rows,
)
from nvembed.data.sources.rows import (
    RawRow,
    check_columns,
    pairs_to_rows,
    renamed_columns,
    require_every_split,
    rows_of_records,
)
from nvembed.text.identity import MAX_TEXT_BYTES
from nvembed.types import UserError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
ADVICE = "Give more rows or raise test_share; rows that share a query or a positive cannot be divided."
_JOINED_LINES = 200  # of one row
CheckColumns = Callable[[Iterable[str], str], None]


def read_files(config: FilesSource) -> SourceRows:
    """Read every file (`*` in a URI lists many, a folder all its files of a known kind).

    Raises:
        UserError: a file is missing, of another kind, or its columns are of no known shape; a split is empty.
    """
    check = column_check(config)
    return rows_of_task((row for uri in config.uris for file in _expand(uri) for row in read_file(file, check)), config)


def column_check(config: RowSource) -> CheckColumns:
    """A check of a source's columns, after the source's mapping to our names."""
    check = {"retrieval": check_columns, "sts": check_graded_columns}.get(config.task, check_labelled_columns)
    ours = {theirs: name for name, theirs in config.columns.items()}

    def checked(names: Iterable[str], place: str) -> None:
        given = list(names)
        if twice := sorted({name for name in given if given.count(name) > 1}):
            raise UserError(f"{place} has two columns called {', '.join(twice)}. Rename or remove one.")
        if missing := [theirs for theirs in ours if theirs not in given]:
            raise UserError(
                f"{place} has the columns {', '.join(given) or '(none)'}; `columns` maps {', '.join(missing)}, which "
                "is not there."
            )
        check([ours.get(name, name) for name in given], place)

    return checked


def rows_of_task(raw_rows: Iterable[RawRow], config: RowSource) -> SourceRows:
    """Rows turned into the examples of the source's task.

    Raises:
        UserError: a split is empty.
    """
    raw_rows = renamed_columns(raw_rows, config.columns)
    if config.task == "retrieval":
        rows = pairs_to_rows(raw_rows, config.name, config.test_share, config.licence)
    elif config.task == "sts":
        rows = graded_to_rows(raw_rows, config)
    else:
        rows = labelled_to_rows(raw_rows, config)
    require_every_split(rows, config.name, ADVICE)
    return rows


@retried
def _expand(uri: str) -> list[str]:
    """URIs of the files a pattern or a folder names."""
    fs, path = storage.filesystem(uri)
    if fs.exists(path) or not any(character in path for character in "*?["):
        if fs.isdir(path):
            found = storage.files_below(uri)
            names = [found[name] for name in found if _kind(name) is not None and not _hidden(name)]
            if not names:
                raise UserError(f"{uri}: the folder holds no file of a known kind ({', '.join(FORMATS)}).")
            return [storage.uri_of(fs, name) for name in names]
        if not fs.exists(path):
            raise UserError(f"{uri}: no such file. Give the uris of a files source as paths or fsspec URIs.")
        return [uri]
    names = sorted(str(name) for name in fs.glob(path))
    if not names:
        raise UserError(f"{uri}: the pattern matches no file.")
    return [storage.uri_of(fs, name) for name in names]


def _hidden(name: str) -> bool:
    """Whether a file below a folder is no data by the convention of Hadoop, Arrow and Spark: `.x`, `_SUCCESS`."""
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _kind(name: str) -> str | None:
    """The ending that names the format, without a compression's ending."""
    base = next((name.removesuffix(ending) for ending in COMPRESSIONS if name.endswith(ending)), name)
    return next((ending for ending in FORMATS if base.endswith(ending)), None)


@contextmanager
def open_bytes(uri: str) -> Iterator[IO[bytes]]:
    """A file, uncompressed by its ending."""
    with storage.open_reader(uri) as file:
        if uri.endswith(".zst"):  # fsspec needs one more package for it, which Arrow brings along
            with pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd") as stream:
                yield cast(IO[bytes], io.BufferedReader(stream, 1 << 20))
        elif (kind := fsspec.utils.infer_compression(uri)) is not None:
            with fsspec.compression.compr[kind](file, mode="rb") as stream:
                yield stream
        else:
            yield file


def read_file(uri: str, check: CheckColumns = check_columns) -> Iterator[RawRow]:
    """Rows of one file, in order, one at a time.

    Raises:
        UserError: unknown kind of file, or (csv, tsv, parquet) columns that `check` refuses.
    """
    name, kind = uri.rsplit("/", 1)[-1], _kind(uri)
    if kind is None:
        listed = f"{', '.join(FORMATS)}, each but parquet also with {', '.join(COMPRESSIONS)}"
        raise UserError(f"{uri}: unknown kind of file. Known endings: {listed}.")
    if kind == ".parquet":
        with storage.open_reader(uri) as file:
            yield from _parquet_rows(file, name, check)
        return
    with open_bytes(uri) as file:
        if kind in (".jsonl", ".json"):
            yield from json_lines(file, name)
        else:
            yield from _csv_rows(file, name, check, "\t" if kind == ".tsv" else ",")


def json_lines(file: IO[bytes], name: str) -> Iterator[RawRow]:
    """One JSON object a line; blank lines are skipped, not counted."""
    for number, line in bounded_lines(file, name):
        if line is None:
            yield RawRow(name, number, None, f"longer than {MAX_LINE_BYTES:,} bytes")
            continue
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


def _csv_rows(file: IO[bytes], name: str, check: CheckColumns, delimiter: str) -> Iterator[RawRow]:
    """Rows of a csv or tsv file with a header; broken bytes become surrogates, which `parse_row` refuses."""
    csv.field_size_limit(2**31 - 1)  # of the process; the default refuses texts over 128 kB
    lines = _Lines(bounded_lines(file, name, keep_ends=True))
    header = next((fields for _, fields in _fields_of_rows(lines, delimiter, None)), [])
    if isinstance(header, str):
        raise UserError(f"{name}: its first line, the header, is {header}. Correct it.")
    check(header, name)
    for number, fields in _fields_of_rows(lines, delimiter, len(header)):
        if isinstance(fields, str):
            yield RawRow(name, number, None, fields)
        elif len(fields) > len(header):
            yield RawRow(name, number, None, "more fields than the header")
        elif fields:
            yield RawRow(name, number, dict(itertools.zip_longest(header, fields)))


def _fields_of_rows(lines: _Lines, delimiter: str, width: int | None) -> Iterator[tuple[int, list[str] | str]]:
    """Line and fields of every row, or what is wrong with it; an unbalanced quote costs one line, never what follows.

    A quoted field may hold line ends: lines are joined where that gives a row of `width` fields. Where none does, the
    quote is a letter of a tsv file, which has no quoting, and a fault in a csv file.
    """
    for number, line in lines:
        if line is None:
            yield number, f"longer than {MAX_LINE_BYTES:,} bytes"
        elif '"' not in line or (fields := _quoted(line, lines, delimiter, width)) is None:
            plain = line.rstrip("\r\n")
            yield number, plain.split(delimiter) if plain else []
        else:
            yield number, fields


def _quoted(line: str, lines: _Lines, delimiter: str, width: int | None) -> list[str] | str | None:
    """The fields of a line with quotes, a fault, or None where the quotes are letters."""
    fields = _parsed(line, delimiter)
    if fields is not None and (width is None or len(fields) == width):
        return fields
    joined = _joined(line, lines, delimiter, width)
    if joined is not None or delimiter == "\t":
        return joined
    return "a quote that is not closed" if fields is None else fields


def _parsed(text: str, delimiter: str) -> list[str] | None:
    """The fields of one row; None where its quotes are not well-formed."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


def _joined(line: str, lines: _Lines, delimiter: str, width: int | None) -> list[str] | None:
    """The fields of a row over several lines, which are then read; None, and no line is read, where there is none.

    A row ends with the first line after which every quote has its partner: only that one is tried.
    """
    parts, quotes, size = [line], line.count('"'), len(line)
    ahead = lines.ahead()
    while quotes % 2:
        following = next(ahead, None)
        if following is None or len(parts) > _JOINED_LINES or size > MAX_TEXT_BYTES:
            return None
        parts.append(following)
        quotes, size = quotes + following.count('"'), size + len(following)
    fields = _parsed("".join(parts), delimiter) if len(parts) > 1 else None
    if fields is None or (width is not None and len(fields) != width):
        return None
    lines.skip(len(parts) - 1)
    return fields


class _Lines:
    """Numbered lines as text, some of which can be looked at before they are read."""

    def __init__(self, lines: Iterable[tuple[int, bytes | None]]) -> None:
        self._lines = iter(lines)
        self._seen: deque[tuple[int, str | None]] = deque()

    def __iter__(self) -> Iterator[tuple[int, str | None]]:
        while self._seen or self._look():
            yield self._seen.popleft()

    def _look(self) -> bool:
        number, line = next(self._lines, (0, None))
        if number:
            self._seen.append((number, None if line is None else line.decode("utf-8", "surrogateescape")))
        return bool(number)

    def ahead(self) -> Iterator[str]:
        """The lines that follow, up to one that is too long."""
        place = 0
        while place < len(self._seen) or self._look():
            line = self._seen[place][1]
            if line is None:
                return
            yield line
            place += 1

    def skip(self, count: int) -> None:
        """Read some of the lines that were looked at."""
        for _ in range(count):
            self._seen.popleft()


def _parquet_rows(file: IO[bytes], name: str, check: CheckColumns) -> Iterator[RawRow]:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{name} is not a parquet file, or cut short ({error}).") from error
    check(parquet.schema_arrow.names, name)
    yield from rows_of_records((row for batch in parquet.iter_batches(8192) for row in batch.to_pylist()), name)
