"""`nvembed search`: try a model by hand. One query, a corpus of any size, the best documents with texts (layer 6).

The corpus is what `nvembed embed` takes (txt, jsonl, parquet) or a BEIR folder (its `corpus.jsonl`). It is embedded as
it streams by and nothing of it is kept; a file that `nvembed embed` wrote may hold its vectors instead. The search is
the exact one of mining and evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from nvembed.core import storage
from nvembed.retrieval.encode_file import (
    BLOCK_ROWS,
    EmbedJob,
    check_rows,
    cut,
    input_kind,
    iter_rows,
    job_prompt,
    open_job_encoder,
)
from nvembed.types import UserError

SNIPPET = 160
Encode = Callable[[Sequence[str], str], np.ndarray]


@dataclass(frozen=True)
class Hit:
    """A document that was found."""

    rank: int
    score: float
    id: str
    text: str


@dataclass(frozen=True)
class SearchJob:
    """What `search` is asked for.

    Attributes:
        corpus: how the corpus is read and embedded; its instruction or prompt name is the query's, documents carry
            none; `target` is not used.
        query: the text that is searched for.
        k: documents wanted.
        vectors: parquet or npy file that `nvembed embed` wrote of the same corpus with the same model; None: embed now.
    """

    corpus: EmbedJob
    query: str
    k: int = 10
    vectors: str | None = None


def corpus_source(uri: str) -> tuple[str, str | None]:
    """File of a corpus and its title column: a BEIR folder's `corpus.jsonl` with `title`, any other file as it is."""
    beir = storage.join(uri, "corpus.jsonl")
    if not uri.endswith((".txt", ".jsonl", ".ndjson", ".parquet")) and storage.exists(beir):
        return beir, "title"
    return uri, None


def search(job: SearchJob, say: Callable[[str], None]) -> list[Hit]:
    """The best documents, best first; ties by their place in the corpus.

    Raises:
        UserError: a bad row or option, an empty query, vectors that do not belong to the corpus or the model.
    """
    from nvembed.retrieval.exact.search import search_exact

    if not job.query.strip():
        raise UserError("the query is empty")
    prompt = job_prompt(job.corpus)
    kind = input_kind(job.corpus.source)
    total = check_rows(job.corpus, kind)
    if not total:
        raise UserError(f"{job.corpus.source} holds no text")
    encoder = open_job_encoder(job.corpus, prompt)
    dim = job.corpus.dim or encoder.dim
    if not 1 <= dim <= encoder.dim:
        raise UserError(f"--dim {dim}: this model's vectors have {encoder.dim} numbers; choose 1 to {encoder.dim}.")

    def encode(texts: Sequence[str], prompt: str) -> np.ndarray:
        return cut(encoder.encode(texts, [prompt] * len(texts)), dim)

    query_1D = encode([job.query], prompt)
    if job.vectors is None:
        shards = _embedded(job.corpus, kind, encode, total, say)
    else:
        shards = _stored(job, kind, total, encoder.dim, dim)
    found, scores = search_exact(query_1D, shards, job.k)
    rows = _texts(job.corpus, kind, {int(key) for key in found[0]})
    return [
        Hit(rank, float(score), *rows[int(key)])
        for rank, (key, score) in enumerate(zip(found[0], scores[0], strict=False), start=1)
    ]


def _key(number: int) -> str:
    """Ids of a corpus may repeat; a row's number does not, and sorts as it counts."""
    return f"{number:012d}"


def _embedded(
    corpus: EmbedJob, kind: str, encode: Encode, total: int, say: Callable[[str], None]
) -> Iterator[tuple[list[str], np.ndarray]]:
    rows, done, started = iter_rows(corpus, kind), 0, time.monotonic()
    block_rows = min(BLOCK_ROWS, 256)  # a block takes a second or so: the progress moves
    while block := list(islice(rows, block_rows)):
        matrix_ND = encode([text for _, text in block], "")
        yield [_key(done + index) for index in range(len(block))], matrix_ND
        done += len(block)
        rate = done / (time.monotonic() - started)
        if total > block_rows:
            say(f"{done:,} of {total:,} documents, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left")


def _stored(job: SearchJob, kind: str, total: int, whole: int, dim: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Vectors of a file, block by block, checked against the corpus."""
    assert job.vectors is not None
    done = 0
    ids = (row_id for row_id, _ in iter_rows(job.corpus, kind))
    for stored_ids, matrix_ND in _read(job.vectors):
        expected = list(islice(ids, len(matrix_ND)))
        if len(expected) != len(matrix_ND) or (stored_ids is not None and stored_ids != expected):
            break
        if matrix_ND.shape[1] not in (whole, dim):
            raise UserError(
                f"--vectors {job.vectors}: vectors of {matrix_ND.shape[1]} numbers, the model gives {whole}. "
                "Write them anew: nvembed embed"
            )
        yield [_key(done + index) for index in range(len(matrix_ND))], cut(matrix_ND, dim)
        done += len(matrix_ND)
    if done != total:
        raise UserError(
            f"--vectors {job.vectors}: not the vectors of {job.corpus.source} (they agree for {done:,} of {total:,} "
            "rows). Write them anew: nvembed embed"
        )


def _read(uri: str) -> Iterator[tuple[list[str] | None, np.ndarray]]:
    if not storage.exists(uri):
        raise UserError(f"--vectors {uri}: no such file.")
    if uri.endswith(".npy"):
        if not storage.is_local(uri):
            raise UserError(f"--vectors {uri}: an npy file must be local; use parquet")
        matrix_ND = np.load(Path(storage.local_path(uri)), mmap_mode="r", allow_pickle=False)
        for start in range(0, len(matrix_ND), BLOCK_ROWS):
            yield None, np.asarray(matrix_ND[start : start + BLOCK_ROWS], dtype=np.float32)
        return
    import pyarrow as pa

    from nvembed.core.parquet import iter_parquet
    from nvembed.core.steps import CorruptArtifactError
    from nvembed.core.vectors import table_matrix

    try:
        for table in iter_parquet(uri, ["id", "vector"], BLOCK_ROWS):
            yield table.column("id").to_pylist(), table_matrix(table)
    except (CorruptArtifactError, pa.ArrowException, KeyError) as error:
        raise UserError(f"--vectors {uri}: not a file that `nvembed embed` wrote ({error}).") from error


def _texts(corpus: EmbedJob, kind: str, numbers: set[int]) -> dict[int, tuple[str, str]]:
    """Id and text of some rows, from a second reading."""
    last = max(numbers, default=-1)
    rows = islice(iter_rows(replace(corpus), kind), last + 1)
    return {number: row for number, row in enumerate(rows) if number in numbers}


def snippet(text: str, width: int = SNIPPET) -> str:
    """A text on one line, cut with an ellipsis."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: max(width - 1, 1)].rstrip() + "…"


def as_text(hits: Sequence[Hit], width: int) -> str:
    """The hits for people, one line each."""
    ids = max((len(hit.id) for hit in hits), default=0)
    ids = min(ids, 40)
    room = max(20, width - ids - 15)
    return "\n".join(
        f"{hit.rank:>3}  {hit.score:7.4f}  {snippet(hit.id, 40):<{ids}}  {snippet(hit.text, room)}" for hit in hits
    )
