"""`nvembed search`: one query, a corpus of any size, the best documents with their texts.

The corpus is a file that `nvembed embed` takes (txt, jsonl, parquet) or a BEIR folder (its `corpus.jsonl`). It is
embedded block by block and nothing of it is stored; a file that `nvembed embed` wrote may hold its vectors instead. The
search is the exact one of mining and evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from nvembed.core import storage
from nvembed.data.tables import BEIR_CORPUS
from nvembed.retrieval import text_file
from nvembed.retrieval.encode_file import ModelOptions, cut
from nvembed.retrieval.text_file import TextFile, check_rows, iter_rows
from nvembed.retrieval.vector_file import iter_vector_file
from nvembed.types import UserError

SNIPPET = 160
BLOCK_ROWS = 256  # embedded at once: a second or so, so that the progress moves
Encode = Callable[[Sequence[str], str], np.ndarray]


@dataclass(frozen=True)
class Hit:
    """A document of the result."""

    rank: int
    score: float
    id: str
    text: str


@dataclass(frozen=True)
class SearchRequest:
    """The work of `search`.

    Attributes:
        model: its instruction or prompt name is the query's; documents carry none.
        query: the text that is searched for.
        k: documents wanted.
        vectors: parquet or npy file that `nvembed embed` wrote of the same corpus with the same model; None: embed now.
    """

    model: ModelOptions
    corpus: TextFile
    query: str
    k: int = 10
    vectors: str | None = None


def corpus_source(uri: str) -> tuple[str, str | None]:
    """File of a corpus and its title column: a BEIR folder's `corpus.jsonl` with `title`, any other file as it is."""
    beir = storage.join(uri, BEIR_CORPUS)
    if not uri.endswith(text_file.SUFFIXES) and storage.exists(beir):
        return beir, "title"
    return uri, None


def search(request: SearchRequest, report_progress: Callable[[str], None]) -> list[Hit]:
    """The best documents, best first; ties by their place in the corpus.

    Raises:
        UserError: a bad row or option, an empty query, vectors that do not belong to the corpus or the model.
    """
    from nvembed.retrieval.exact.search import search_exact

    if not request.query.strip():
        raise UserError("the query is empty")
    prompt = request.model.prompt()
    total = check_rows(request.corpus)
    if not total:
        raise UserError(f"{request.corpus.uri} holds no text")
    encoder = request.model.open()
    dim = request.model.width(encoder)

    def encode(texts: Sequence[str], prompt: str) -> np.ndarray:
        return cut(encoder.encode(texts, [prompt] * len(texts)), dim)

    query_1D = encode([request.query], prompt)
    if request.vectors is None:
        shards = _embedded(request.corpus, encode, total, report_progress)
    else:
        shards = _stored(request.corpus, request.vectors, total, encoder.dim, dim)
    ids, scores = search_exact(query_1D, shards, request.k)
    rows = _texts(request.corpus, {int(key) for key in ids[0]})
    return [
        Hit(rank, float(score), *rows[int(key)])
        for rank, (key, score) in enumerate(zip(ids[0], scores[0], strict=False), start=1)
    ]


def _key(number: int) -> str:
    """A row number as an id of the search: unique where a corpus repeats ids, and in numerical order."""
    return f"{number:012d}"


def _embedded(
    corpus: TextFile, encode: Encode, total: int, report_progress: Callable[[str], None]
) -> Iterator[tuple[list[str], np.ndarray]]:
    rows, done, started = iter_rows(corpus), 0, time.monotonic()
    while block := list(islice(rows, BLOCK_ROWS)):
        matrix_ND = encode([text for _, text in block], "")
        yield [_key(done + index) for index in range(len(block))], matrix_ND
        done += len(block)
        rate = done / (time.monotonic() - started)
        if total > BLOCK_ROWS:
            report_progress(f"{done:,} of {total:,} documents, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left")


def _stored(
    corpus: TextFile, vectors: str, total: int, full_dim: int, dim: int
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Vectors of a file, block by block, checked against the corpus."""
    done = 0
    ids = (row_id for row_id, _ in iter_rows(corpus))
    for stored_ids, matrix_ND in iter_vector_file(vectors):
        expected = list(islice(ids, len(matrix_ND)))
        if len(expected) != len(matrix_ND) or (stored_ids is not None and stored_ids != expected):
            break
        if matrix_ND.shape[1] not in (full_dim, dim):
            raise UserError(
                f"--vectors {vectors}: vectors of {matrix_ND.shape[1]} numbers, the model gives {full_dim}. "
                "Write them anew: nvembed embed"
            )
        yield [_key(done + index) for index in range(len(matrix_ND))], cut(matrix_ND, dim)
        done += len(matrix_ND)
    if done != total:
        raise UserError(
            f"--vectors {vectors}: not the vectors of {corpus.uri} (they agree for {done:,} of {total:,} "
            "rows). Write them anew: nvembed embed"
        )


def _texts(corpus: TextFile, numbers: set[int]) -> dict[int, tuple[str, str]]:
    """Id and text of some rows, from a second reading."""
    last = max(numbers, default=-1)
    rows = islice(iter_rows(corpus), last + 1)
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
