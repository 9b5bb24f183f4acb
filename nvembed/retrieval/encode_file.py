"""`nvembed embed`: a file of texts in, a file of vectors out, block by block (layer 6).

    txt      one text per line; ids are line numbers from 1
    jsonl    one object per line, text in `text`, id in `id` or `_id` (else the line number)
    parquet  text in `text`, id in `id` (else the row number from 1)

The whole input is checked before the model is loaded. Parquet output has `id` and `vector`; npy has the vectors in the
input's order. The output appears when it is complete, and never in part.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from nvembed.core import storage
from nvembed.text.identity import text_problem
from nvembed.text.instructions import instruction_prefix, named_prompt
from nvembed.types import UserError

if TYPE_CHECKING:
    from nvembed.retrieval.cache import VectorCache
    from nvembed.retrieval.encoders import Encoder
    from nvembed.retrieval.rows import Encoded

INPUTS, OUTPUTS = (".txt", ".jsonl", ".ndjson", ".parquet"), (".parquet", ".npy")
BLOCK_ROWS = 2048
SHOWN = 5  # bad rows named in the error
_SAY_SECONDS = 5.0


class BadRow(ValueError):
    """A row without a usable text."""


@dataclass(frozen=True)
class EmbedJob:
    """What `write_vectors` is asked for.

    Attributes:
        model: model folder.
        source: txt, jsonl or parquet; any URI.
        target: parquet or npy; any URI.
        instruction: task sentence or its key, for queries; None for documents.
        prompt_name: a prompt that the model folder stores, instead.
        dim: Matryoshka prefix, None for the full width.
        batch_tokens: tokens of one forward, padding included.
        text_column: where the text stands in jsonl and parquet.
        title_column: put before the text, if given.
        precision: "fp32", "bf16" or "auto".
        threads: torch threads, None for torch's own choice.
        force: replace an existing target.
        cache: directory (any URI) of vectors of earlier runs; texts found there are not embedded again.
    """

    model: str
    source: str
    target: str
    instruction: str | None = None
    prompt_name: str | None = None
    dim: int | None = None
    batch_tokens: int = 4096
    text_column: str = "text"
    title_column: str | None = None
    precision: str = "fp32"
    threads: int | None = None
    force: bool = False
    cache: str | None = None


@dataclass(frozen=True)
class Written:
    """What `write_vectors` wrote.

    Attributes:
        rows, dim: its shape.
        truncated: texts with more tokens than `max_length`, of which the first were embedded.
    """

    rows: int
    dim: int
    truncated: int
    max_length: int


def write_vectors(job: EmbedJob, say: Callable[[str], None]) -> Written:
    """Embed a file.

    Raises:
        UserError: bad rows (with their lines), an unknown format, an existing target, an impossible `dim`.
    """
    prompt = job_prompt(job)
    source_kind, target_kind = input_kind(job.source), _suffix(job.target, OUTPUTS, "output")
    if storage.exists(job.target) and not job.force:
        raise UserError(f"{job.target} exists. Choose another --out, or give --force to replace it.")
    total = check_rows(job, source_kind)
    encoder = open_job_encoder(job, prompt)
    cache = _known(job, encoder, prompt)
    dim = encoder.dim if job.dim is None else job.dim
    if not 1 <= dim <= encoder.dim:
        raise UserError(f"--dim {dim}: this model's vectors have {encoder.dim} numbers; choose 1 to {encoder.dim}.")
    with _published(job.target) as file, closing(_writer(target_kind, file, total, dim)) as writer:
        started = said = time.monotonic()
        done = truncated = 0
        rows = iter_rows(job, source_kind)
        while block := list(islice(rows, BLOCK_ROWS)):
            ids, texts = zip(*block, strict=True)
            found = _encoded(job, encoder, cache, prompt, ids, texts)
            writer.write(ids, cut(found.matrix_AD, dim))
            truncated += int((found.cut_A == 1).sum())
            done += len(block)
            if (now := time.monotonic()) - said >= _SAY_SECONDS:
                said, rate = now, done / (now - started)
                say(f"{done:,} of {total:,} texts, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left")
    if cache is not None:
        cache.settle()
    return Written(total, dim, truncated, encoder.max_length)


def input_kind(uri: str) -> str:
    """Suffix of an input file.

    Raises:
        UserError: it is none of `INPUTS`.
    """
    return _suffix(uri, INPUTS, "input")


def _suffix(uri: str, known: Sequence[str], what: str) -> str:
    for suffix in known:
        if uri.lower().endswith(suffix):
            return suffix
    raise UserError(f"{uri}: unknown {what} format; the name must end in one of {', '.join(known)}.")


def cut(matrix_ND: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` columns, rows scaled to length 1 again: float32 [N, dim]."""
    from nvembed.losses.matryoshka import prefix_rows

    return matrix_ND if dim == matrix_ND.shape[1] else prefix_rows(matrix_ND, dim)


# -- reading ----------------------------------------------------------------------------------------------------------


def check_rows(job: EmbedJob, kind: str) -> int:
    """Read the whole input once; the number of rows.

    Raises:
        UserError: naming the first bad rows by line, and how many there are.
    """
    bad: list[str] = []
    count = 0
    for number, row in _numbered(job, kind):
        count += 1
        try:
            _identified(row, number, job)
        except BadRow as error:
            bad.append(f"line {number}: {error}" if len(bad) < SHOWN else "")
    if bad:
        listed = "\n  ".join(line for line in bad if line)
        raise UserError(
            f"{job.source}: {len(bad)} of {count} rows cannot be embedded, nothing was written:\n  {listed}\n"
            "Mend or remove them."
        )
    return count


def iter_rows(job: EmbedJob, kind: str) -> Iterator[tuple[str, str]]:
    """(id, text) of every row, in order."""
    for number, row in _numbered(job, kind):
        yield _identified(row, number, job)


def _identified(row: Any, number: int, job: EmbedJob) -> tuple[str, str]:
    if isinstance(row, BadRow):
        raise row
    if isinstance(row, str):
        return str(number), _usable(row, "the line")
    text = _usable(row.get(job.text_column), job.text_column)
    if job.title_column is not None:
        text = _titled(row.get(job.title_column), text, job.title_column)
    found = next((row[key] for key in ("id", "_id") if row.get(key) is not None), number)
    return str(found), text


def _usable(text: Any, where: str) -> str:
    if text is None:
        raise BadRow(f"no {where}")
    if (problem := text_problem(text)) is not None:
        raise BadRow(f"{where} {problem}")
    found: str = text
    return found


def _titled(title: Any, text: str, where: str) -> str:
    from nvembed.data.tables import document_text

    if title is not None and not isinstance(title, str):
        raise BadRow(f"{where} is {type(title).__name__}, not a text")
    return document_text(title or "", text)


def _numbered(job: EmbedJob, kind: str) -> Iterator[tuple[int, Any]]:
    """Rows with their numbers from 1: a text, a mapping, or the BadRow that stands for a line that is none."""
    fs, path = storage.filesystem(job.source)
    if not fs.exists(path) or fs.isdir(path):
        raise UserError(f"{job.source}: no such file.")
    with fs.open(path, "rb") as file:
        rows = _parquet(file, job) if kind == ".parquet" else map(_LINES[kind], _lines(file))
        yield from enumerate(rows, start=1)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    for line in file:  # only \n ends a line: splitlines would also cut at U+2028 and the like
        yield line.rstrip(b"\r\n")


def _text_line(line: bytes) -> Any:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start + 1})")


def _json_line(line: bytes) -> Any:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start + 1})")
    except ValueError as error:
        return BadRow(f"not JSON ({error})" if line.strip() else "empty")
    return row if isinstance(row, dict) else BadRow(f"a JSON {type(row).__name__}, not an object")


_LINES: dict[str, Callable[[bytes], Any]] = {".txt": _text_line, ".jsonl": _json_line, ".ndjson": _json_line}


def _parquet(file: Any, job: EmbedJob) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        wanted = [job.text_column, *([job.title_column] if job.title_column is not None else [])]
        if missing := [name for name in wanted if name not in names]:
            raise UserError(
                f"{job.source}: no column {', '.join(missing)}; it has {', '.join(names)}. See --text-column."
            )
        columns = [*wanted, *(name for name in ("id", "_id") if name in names)]
        for batch in table.iter_batches(batch_size=BLOCK_ROWS, columns=columns):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{job.source}: not a parquet file that can be read ({error}).") from error


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def _published(target: str) -> Iterator[IO[bytes]]:
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


def _writer(kind: str, file: IO[bytes], rows: int, dim: int) -> _ParquetWriter | _NpyWriter:
    return _ParquetWriter(file, dim) if kind == ".parquet" else _NpyWriter(file, rows, dim)


class _ParquetWriter:
    """Columns `id` (string) and `vector` (FixedSizeList<float32>), one row group per block."""

    def __init__(self, file: IO[bytes], dim: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), dim))])
        self._writer = pq.ParquetWriter(file, self._schema, compression="none", use_dictionary=False)

    def write(self, ids: Sequence[str], matrix_ND: np.ndarray) -> None:
        import pyarrow as pa

        flat = pa.array(np.ascontiguousarray(matrix_ND, dtype=np.float32).reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(flat, matrix_ND.shape[1])
        self._writer.write_table(pa.table([pa.array(ids, pa.string()), vectors], schema=self._schema))

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


# -- model ------------------------------------------------------------------------------------------------------------


def stored_prompts(model: str) -> dict[str, str]:
    """The prompts by name that a model folder stores for sentence-transformers; none where it stores none."""
    path = Path(model) / "config_sentence_transformers.json"
    try:
        prompts: dict[str, str] = json.loads(path.read_text(encoding="utf-8")).get("prompts", {})
    except (OSError, ValueError):
        return {}
    return prompts


def job_prompt(job: EmbedJob) -> str:
    """The prompt of the job's queries; "" without instruction and prompt name.

    Raises:
        UserError: an unknown key or name.
    """
    if job.prompt_name is not None:
        return named_prompt(stored_prompts(job.model), job.prompt_name)
    return "" if job.instruction is None else instruction_prefix(job.instruction)


def open_job_encoder(job: EmbedJob, prompt: str) -> Encoder:
    """The job's model, on a GPU where there is one."""
    import torch

    from nvembed.retrieval.encoders import as_model_config, open_encoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_encoder(
        as_model_config(job.model, bool(prompt)),
        job.threads,
        job.precision,
        token_budget=job.batch_tokens,
        device=device,
    )


def _known(job: EmbedJob, encoder: Encoder, prompt: str) -> VectorCache | None:
    from nvembed.retrieval.encode import open_cache
    from nvembed.retrieval.encoders import as_model_config

    return (
        None
        if job.cache is None
        else open_cache(job.cache, as_model_config(job.model, bool(prompt)), encoder.precision)
    )


def _encoded(
    job: EmbedJob,
    encoder: Encoder,
    cache: VectorCache | None,
    prompt: str,
    ids: Sequence[str],
    texts: Sequence[str],
) -> Encoded:
    """Vectors of a block, none of them missing.

    Raises:
        UserError: a vector is not finite (the texts were checked before the model was loaded).
    """
    from nvembed.retrieval.rows import encode_checked

    found = encode_checked(encoder, texts, [prompt] * len(texts), cache=cache)
    if found.rejected:
        place, problem = next(iter(found.rejected.items()))
        raise UserError(f"{job.source}: text {ids[place]!r} {problem}. Try --precision fp32.")
    return found
