"""Writing a prepared data set back to the formats others read: BEIR, sentence-transformers jsonl, FlagEmbedding jsonl.

Classification and graded pairs have no place in these formats: only retrieval examples can be written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nvembed import storage
from nvembed.data.tables import Document, document_text
from nvembed.storage import UserError
from nvembed.types import TaskType, TrainingExample

Rows = Iterable[Mapping[str, Any]]


def write_beir(
    documents: Sequence[Document], examples: Mapping[str, Sequence[TrainingExample]], folder_uri: str
) -> None:
    """Write `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv` for every split given.

    Positives are judged with their score, rounded down to at least 1 (1 without a score), given negatives with 0.
    """
    _check(row for rows in examples.values() for row in rows)
    corpus = ({"_id": row.id, "title": row.title, "text": row.text} for row in documents)
    _write_lines(storage.join(folder_uri, "corpus.jsonl"), corpus)
    queries = {row.id: row.query for rows in examples.values() for row in rows}
    _write_lines(
        storage.join(folder_uri, "queries.jsonl"), ({"_id": key, "text": text} for key, text in queries.items())
    )
    for split, rows in examples.items():
        lines = ["query-id\tcorpus-id\tscore"]
        for row in rows:
            lines += [f"{row.id}\t{item.id}\t{max(1, int(item.score or 1))}" for item in row.positives]
            lines += [f"{row.id}\t{item.id}\t0" for item in row.negatives]
        data = ("\n".join(lines) + "\n").encode()
        storage.write_bytes(storage.join(folder_uri, "qrels", f"{split}.tsv"), data)


def write_sentence_transformers(documents: Sequence[Document], examples: Sequence[TrainingExample], uri: str) -> None:
    """Write jsonl with `anchor`, `positive`, `negative_1`...: one line for each positive of each example."""
    _check(examples)
    text = _texts(documents)

    def rows() -> Rows:
        for example in examples:
            negatives = {f"negative_{place}": text(item.id) for place, item in enumerate(example.negatives, start=1)}
            for item in example.positives:
                yield {"anchor": example.query, "positive": text(item.id), **negatives}

    _write_lines(uri, rows())


def write_flag_embedding(documents: Sequence[Document], examples: Sequence[TrainingExample], uri: str) -> None:
    """Write jsonl with `query`, `pos`, `neg`, and their scores where every one has a score."""
    _check(examples)
    text = _texts(documents)

    def rows() -> Rows:
        for example in examples:
            row: dict[str, Any] = {"query": example.query}
            for name, items in (("pos", example.positives), ("neg", example.negatives)):
                row[name] = [text(item.id) for item in items]
                if items and all(item.score is not None for item in items):
                    row[f"{name}_scores"] = [item.score for item in items]
            yield row

    _write_lines(uri, rows())


def _check(examples: Iterable[TrainingExample]) -> None:
    other = sorted({row.task.value for row in examples if row.task is not TaskType.RETRIEVAL})
    if other:
        raise UserError(f"{', '.join(other)} examples cannot be written in this format; only retrieval ones can.")


def _texts(documents: Sequence[Document]) -> Callable[[str], str]:
    """Text of a document by id, title included."""
    by_id = {row.id: document_text(row.title, row.text) for row in documents}
    return by_id.__getitem__


def _write_lines(uri: str, rows: Rows) -> None:
    storage.write_bytes(uri, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
