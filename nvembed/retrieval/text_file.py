"""Files of texts: txt, jsonl and parquet, any URI, read row by row.

txt      one text per line; ids are line numbers from 1
jsonl    one object per line, text in `text`, id in `id` or `_id` (else the line number)
parquet  text in `text`, id in `id` (else the row number from 1)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from nvembed.core import storage
from nvembed.core.lines import MAX_LINE_BYTES, bounded_lines
from nvembed.text.identity import text_problem
from nvembed.types import UserError

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")
READ_ROWS = 2048  # of a parquet file at once
SHOWN = 5  # bad rows named in the error


class BadRow(ValueError):
    """A row without a usable text."""


@dataclass(frozen=True)
class TextFile:
    """A file of texts.

    Attributes:
        uri: txt, jsonl or parquet.
        text_column: where the text is, in jsonl and parquet.
        title_column: put before the text, if given.
    """

    uri: str
    text_column: str = "text"
    title_column: str | None = None


def file_suffix(uri: str, known: Sequence[str], what: str) -> str:
    """The suffix of a file's name.

    Raises:
        UserError: it is none of `known`.
    """
    for suffix in known:
        if uri.lower().endswith(suffix):
            return suffix
    raise UserError(f"{uri}: unknown {what} format; the name must end in one of {', '.join(known)}.")


def check_rows(texts: TextFile) -> int:
    """Read the whole input once; the number of rows.

    Raises:
        UserError: naming the first bad rows by line, and how many there are.
    """
    bad: list[str] = []
    count = 0
    for number, row in _numbered(texts):
        count += 1
        try:
            _identified(row, number, texts)
        except BadRow as error:
            bad.append(f"line {number}: {error}" if len(bad) < SHOWN else "")
    if bad:
        listed = "\n  ".join(line for line in bad if line)
        raise UserError(
            f"{texts.uri}: {len(bad)} of {count} rows cannot be embedded, nothing was written:\n  {listed}\n"
            "Correct or remove them."
        )
    return count


def iter_rows(texts: TextFile) -> Iterator[tuple[str, str]]:
    """(id, text) of every row, in order."""
    for number, row in _numbered(texts):
        yield _identified(row, number, texts)


def _identified(row: Any, number: int, texts: TextFile) -> tuple[str, str]:
    if isinstance(row, BadRow):
        raise row
    if isinstance(row, str):
        return str(number), _usable(row, "the line")
    text = _usable(row.get(texts.text_column), texts.text_column)
    if texts.title_column is not None:
        text = _titled(row.get(texts.title_column), text, texts.title_column)
    row_id = next((row[key] for key in ("id", "_id") if row.get(key) is not None), number)
    return str(row_id), text


def _usable(text: Any, where: str) -> str:
    if text is None:
        raise BadRow(f"no {where}")
    if (problem := text_problem(text)) is not None:
        raise BadRow(f"{where} {problem}")
    return str(text)


def _titled(title: Any, text: str, where: str) -> str:
    from nvembed.data.tables import document_text

    if title is not None and not isinstance(title, str):
        raise BadRow(f"{where} is {type(title).__name__}, not a text")
    return document_text(title or "", text)


def _numbered(texts: TextFile) -> Iterator[tuple[int, Any]]:
    """Rows with their numbers from 1: a text, a mapping, or a BadRow."""
    kind = file_suffix(texts.uri, SUFFIXES, "input")
    fs, path = storage.filesystem(texts.uri)
    if not fs.exists(path) or fs.isdir(path):
        raise UserError(f"{texts.uri}: no such file.")
    with fs.open(path, "rb") as file:
        rows = _parquet(file, texts) if kind == ".parquet" else map(_LINES[kind], _lines(file, texts.uri))
        yield from enumerate(rows, start=1)


def _lines(file: IO[bytes], name: str) -> Iterator[bytes | BadRow]:
    for _, line in bounded_lines(file, name):
        yield BadRow(f"longer than {MAX_LINE_BYTES:,} bytes") if line is None else line


def _text_line(line: bytes | BadRow) -> Any:
    if isinstance(line, BadRow):
        return line
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start + 1})")


def _json_line(line: bytes | BadRow) -> Any:
    if isinstance(line, BadRow):
        return line
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start + 1})")
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON ({error})" if line.strip() else "empty")
    return row if isinstance(row, dict) else BadRow(f"a JSON {type(row).__name__}, not an object")


_LINES: dict[str, Callable[[bytes | BadRow], Any]] = {".txt": _text_line, ".jsonl": _json_line, ".ndjson": _json_line}


def _parquet(file: Any, texts: TextFile) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        wanted = [texts.text_column, *([texts.title_column] if texts.title_column is not None else [])]
        if missing := [name for name in wanted if name not in names]:
            raise UserError(
                f"{texts.uri}: no column {', '.join(missing)}; it has {', '.join(names)}. See --text-column."
            )
        columns = [*wanted, *(name for name in ("id", "_id") if name in names)]
        for batch in table.iter_batches(batch_size=READ_ROWS, columns=columns):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{texts.uri}: not a parquet file that can be read ({error}).") from error
