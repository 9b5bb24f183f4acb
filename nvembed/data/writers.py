"""Writing a prepared data set back to the shapes others read, at any fsspec URI.

BEIR folders; rows of sentence-transformers, FlagEmbedding, Tevatron, labelled texts or graded pairs, as jsonl, csv, tsv
or parquet by the ending of the URI (text formats also .gz, .zst, ...), or as a folder that `datasets` loads from disk.
Rows are written as they are made: memory is the corpus' texts by id and one block of rows.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

import fsspec
import pyarrow as pa

from nvembed.core import storage
from nvembed.core.messages import nearest
from nvembed.core.parquet import TableWriter
from nvembed.data.tables import BEIR_CORPUS, BEIR_QUERIES, SPLITS, Document, document_text, read_corpus, read_examples
from nvembed.types import Artifact, TaskType, TrainingExample, UserError

Row = Mapping[str, Any]
_BLOCK_ROWS = 8192


def write_dataset(artifact: Artifact, dataset: str, split: str | None, format: str, uri: str) -> None:
    """Write a data set of a `prepare` artifact in a format that other tools read; a path is replaced.

    Args:
        artifact: of the `prepare` step.
        dataset: name of the data set in its recipe.
        split: train, dev or test; None for all of them. A BEIR folder keeps splits apart, rows follow each other.
        format: one of `FORMATS`.
        uri: folder of `beir`; else a file, whose ending says how rows are stored (`write_rows`).

    Raises:
        UserError: an unknown format, data set or split, or examples that the format cannot hold.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r}: choose one of {', '.join(FORMATS)}.{nearest(format, FORMATS)}")
    examples = {name: read_examples(artifact, dataset, name) for name in (SPLITS if split is None else (split,))}
    rows = read_corpus(artifact, dataset).to_pylist()
    documents = [Document(**row) for row in rows]
    if format == "beir":
        write_beir(documents, examples, uri)
    else:
        FORMATS[format](documents, [example for items in examples.values() for example in items], uri)


def write_beir(
    documents: Sequence[Document], examples: Mapping[str, Sequence[TrainingExample]], folder_uri: str
) -> None:
    """Write `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv` for every split given.

    The grade of a positive is its score, rounded down to at least 1 (1 without a score), that of a given negative 0.
    """
    _check((row for rows in examples.values() for row in rows), TaskType.RETRIEVAL)
    corpus = ({"_id": row.id, "title": row.title, "text": row.text} for row in documents)
    write_rows(corpus, storage.join(folder_uri, BEIR_CORPUS))
    queries = {row.id: row.query for rows in examples.values() for row in rows}
    write_rows(({"_id": key, "text": text} for key, text in queries.items()), storage.join(folder_uri, BEIR_QUERIES))
    for split, rows in examples.items():
        lines = ["query-id\tcorpus-id\tscore"]
        for row in rows:
            lines += [f"{row.id}\t{item.id}\t{max(1, int(item.score or 1))}" for item in row.positives]
            lines += [f"{row.id}\t{item.id}\t0" for item in row.negatives]
        data = ("\n".join(lines) + "\n").encode()
        storage.write_bytes(storage.join(folder_uri, "qrels", f"{split}.tsv"), data)


def write_sentence_transformers(documents: Sequence[Document], examples: Sequence[TrainingExample], uri: str) -> None:
    """Write `anchor`, `positive`, `negative_1`...: one row for each positive of each example."""
    _check(examples, TaskType.RETRIEVAL)
    text = _texts(documents)
    most = max((len(example.negatives) for example in examples), default=0)

    def rows() -> Iterator[Row]:
        for example in examples:
            given = dict(enumerate(example.negatives, start=1))
            negatives = {
                f"negative_{place}": text(given[place].id) if place in given else None for place in range(1, most + 1)
            }
            for item in example.positives:
                yield {"anchor": example.query, "positive": text(item.id), **negatives}

    write_rows(rows(), uri)


def write_flag_embedding(documents: Sequence[Document], examples: Sequence[TrainingExample], uri: str) -> None:
    """Write `query`, `pos`, `neg`, and their scores where every one has a score; no csv or tsv."""
    _check(examples, TaskType.RETRIEVAL)
    text = _texts(documents)

    def rows() -> Iterator[Row]:
        for example in examples:
            row: dict[str, Any] = {"query": example.query}
            for name, items in (("pos", example.positives), ("neg", example.negatives)):
                row[name] = [text(item.id) for item in items]
                if items and all(item.score is not None for item in items):
                    row[f"{name}_scores"] = [item.score for item in items]
            yield row

    write_rows(rows(), uri)


def write_tevatron(documents: Sequence[Document], examples: Sequence[TrainingExample], uri: str) -> None:
    """Write `query_id`, `query`, `positive_passages`, `negative_passages` (lists of `docid`, `title`, `text`)."""
    _check(examples, TaskType.RETRIEVAL)
    by_id = {row.id: {"docid": row.id, "title": row.title, "text": row.text} for row in documents}

    def rows() -> Iterator[Row]:
        for example in examples:
            yield {
                "query_id": example.id,
                "query": example.query,
                "positive_passages": [by_id[item.id] for item in example.positives],
                "negative_passages": [by_id[item.id] for item in example.negatives],
            }

    write_rows(rows(), uri)


def write_labelled(documents: Sequence[Document], examples: Sequence[TrainingExample], uri: str) -> None:
    """Write `text`, `label` of classes or clusters; `documents` are not used."""
    _check(examples, TaskType.CLASSIFICATION, TaskType.CLUSTERING)
    write_rows(({"text": row.query, "label": row.label} for row in examples), uri)


def write_graded(documents: Sequence[Document], examples: Sequence[TrainingExample], uri: str) -> None:
    """Write `sentence1`, `sentence2`, `score` (0 to 1) of graded pairs; a pair in both directions is written once."""
    _check(examples, TaskType.STS)
    text = _texts(documents)
    seen: set[tuple[str, str]] = set()

    def rows() -> Iterator[Row]:
        for example in examples:
            a, b = example.query, text(example.positives[0].id)
            if (b, a) not in seen:
                seen.add((a, b))
                yield {"sentence1": a, "sentence2": b, "score": example.positives[0].score}

    write_rows(rows(), uri)


FORMATS: Mapping[str, Callable[..., None]] = {
    "beir": write_beir,
    "sentence-transformers": write_sentence_transformers,
    "flag-embedding": write_flag_embedding,
    "tevatron": write_tevatron,
    "labelled": write_labelled,
    "graded": write_graded,
}


# -- rows by the ending of the URI ------------------------------------------------------------------------------------


def write_rows(rows: Iterable[Row], uri: str) -> None:
    """Stream rows into a file whose format is that of the URI's ending.

    Endings: .jsonl, .csv, .tsv (each also compressed), .parquet; without one, a folder of `datasets`.

    Raises:
        UserError: a list in csv or tsv, a folder that is not local.
    """
    base = next((uri.removesuffix(end) for end in (".gz", ".zst", ".xz", ".bz2") if uri.endswith(end)), uri)
    if base.endswith(".parquet"):
        with _create(base) as file:
            _write_parquet(rows, file)
    elif base.endswith((".csv", ".tsv")):
        with _create(uri) as file:
            _write_delimited(rows, file, "\t" if base.endswith(".tsv") else ",")
    elif base.endswith((".jsonl", ".json")):
        with _create(uri) as file:
            for row in rows:
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    elif "." in base.rsplit("/", 1)[-1]:
        raise UserError(f"{uri}: unknown ending; choose .jsonl, .csv, .tsv, .parquet, or none for a `datasets` folder.")
    else:
        import datasets

        datasets.Dataset.from_list([dict(row) for row in rows]).save_to_disk(uri)


@contextmanager
def _create(uri: str) -> Iterator[IO[bytes]]:
    """A new file, compressed by its ending, that appears whole or not at all."""
    with storage.open_writer(uri) as file:
        if uri.endswith(".zst"):
            with pa.CompressedOutputStream(pa.PythonFile(file, "w"), "zstd") as stream:
                yield cast(IO[bytes], stream)
        elif (kind := fsspec.utils.infer_compression(uri)) is not None:
            with fsspec.compression.compr[kind](file, mode="wb") as stream:
                yield stream
        else:
            yield file


def _write_delimited(rows: Iterable[Row], file: IO[bytes], delimiter: str) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = None
    for row in rows:
        if lists := [key for key, value in row.items() if isinstance(value, list)]:
            raise UserError(f"{', '.join(lists)}: a list has no place in csv or tsv; write jsonl or parquet.")
        if writer is None:
            writer = csv.DictWriter(text, list(row), delimiter=delimiter, lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    text.flush()
    text.detach()


def _write_parquet(rows: Iterable[Row], file: IO[bytes]) -> None:
    writer, rest = None, iter(rows)
    while block := list(itertools.islice(rest, _BLOCK_ROWS)):
        table = pa.Table.from_pylist([dict(row) for row in block], schema=None if writer is None else writer.schema)
        if writer is None:
            fields = [
                pa.field(field.name, pa.string()) if pa.types.is_null(field.type) else field for field in table.schema
            ]
            table = table.cast(pa.schema(fields))  # a column that only later blocks fill
            writer = TableWriter(file, table.schema)
        writer.write(table)
    if writer is not None:
        writer.close()


def _check(examples: Iterable[TrainingExample], *wanted: TaskType) -> None:
    other = sorted({row.task.value for row in examples if row.task not in wanted})
    if other:
        only = " and ".join(task.value for task in wanted)
        raise UserError(f"{', '.join(other)} examples cannot be written in this format; only {only} ones can.")


def _texts(documents: Sequence[Document]) -> Callable[[str], str]:
    """Text of a document by id, title included."""
    by_id = {row.id: document_text(row.title, row.text) for row in documents}
    return by_id.__getitem__
