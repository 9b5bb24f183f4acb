"""Tables of the `prepare` artifact: schemas, writers, readers (parquet at any fsspec URI).

`<prepare>/<dataset>/corpus.parquet` holds the documents, `examples-{train,dev,test}.parquet` the examples, whose
positives and negatives are ids into that corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nvembed.core import storage
from nvembed.core.retry import retried
from nvembed.core.steps import CorruptArtifactError
from nvembed.types import Artifact, ScoredId, TaskType, TrainingExample, UserError

SPLITS = ("train", "dev", "test")
HELD_OUT = ("dev", "test")
ROW_GROUP_ROWS = 16384

SCORED_IDS = pa.list_(pa.struct([pa.field("id", pa.string(), nullable=False), pa.field("score", pa.float64())]))
CORPUS_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("split", pa.string()),
    ]
)
EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("positives", SCORED_IDS, nullable=False),
        pa.field("negatives", SCORED_IDS, nullable=False),
        pa.field("label", pa.string()),
        pa.field("teacher_scores", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True, slots=True)
class Document:
    """One row of `corpus.parquet`.

    `split` is the side of a text that is itself an item (classification, sts) or answers held-out queries only
    (retrieval); other retrieval documents leave it null.
    """

    id: str
    title: str
    text: str
    label: str | None = None
    split: str | None = None


def document_text(title: str, text: str) -> str:
    """What is embedded and searched for a corpus row: title and text with one space between, as BEIR does."""
    return f"{title} {text}".strip() if title else text


@retried
def write_table(table: pa.Table, uri: str, *, row_group_rows: int = ROW_GROUP_ROWS) -> None:
    """Write one parquet file at any URI."""
    with storage.open_writer(uri) as file:
        pq.write_table(table, file, row_group_size=row_group_rows)


@retried
def write_tables(tables: Callable[[], Iterable[pa.Table]], schema: pa.Schema, uri: str) -> None:
    """Write one parquet file, each table a row group of it; the same bytes as `write_table` of all rows.

    Args:
        tables: gives them from the first one on each time it is called: once for every attempt to write.
    """
    with storage.open_writer(uri) as file, pq.ParquetWriter(file, schema) as writer:
        for table in tables():
            writer.write_table(table, row_group_size=table.num_rows)


@retried
def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one parquet file at any URI.

    Raises:
        CorruptArtifactError: it is missing or is no parquet file.
    """
    try:
        with storage.open_reader(uri) as file:
            return pq.read_table(file, columns=list(columns) if columns is not None else None)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise CorruptArtifactError(f"{uri} cannot be read ({error}). Build its artifact again.") from error


@retried
def read_schema(uri: str) -> pa.Schema:
    """Columns of a parquet file; only its footer is read."""
    with storage.open_reader(uri) as file:
        return pq.read_schema(file)


@retried
def read_rows(uri: str, key: str, wanted: Iterable[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a parquet file whose `key` is among `wanted`, in file order; memory is one batch plus the result."""
    values = pa.array(sorted(set(wanted)), pa.string())
    with storage.open_reader(uri) as opened:
        file = pq.ParquetFile(opened)
        found = [
            batch.filter(pc.is_in(batch.column(key), value_set=values))
            for batch in file.iter_batches(65536, columns=list(columns) if columns is not None else None)
        ]
        schema = found[0].schema if found else file.schema_arrow
    return pa.Table.from_batches([batch for batch in found if batch.num_rows], schema=schema)


# -- corpus and examples ----------------------------------------------------------------------------------------------


def examples_table(examples: Iterable[TrainingExample]) -> pa.Table:
    """Arrow table of examples."""
    rows = list(examples)
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in EXAMPLE_SCHEMA.names}
    columns["task"] = [row.task.value for row in rows]
    for name in ("positives", "negatives"):
        columns[name] = [[{"id": item.id, "score": item.score} for item in getattr(row, name)] for row in rows]
    return pa.table(columns, schema=EXAMPLE_SCHEMA)


def examples_of(table: pa.Table) -> Iterator[TrainingExample]:
    """The examples of an arrow table with `EXAMPLE_SCHEMA`."""
    for row in table.to_pylist():
        yield TrainingExample(
            id=row["id"],
            dataset=row["dataset"],
            task=TaskType(row["task"]),
            query=row["query"],
            positives=tuple(ScoredId(item["id"], item["score"]) for item in row["positives"]),
            negatives=tuple(ScoredId(item["id"], item["score"]) for item in row["negatives"]),
            label=row["label"],
            teacher_scores=None if row["teacher_scores"] is None else tuple(row["teacher_scores"]),
        )


# -- the prepare artifact ---------------------------------------------------------------------------------------------


def dataset_info(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """What `prepare` recorded of each data set: task, instruction, split rule, counts (in the recipe's order)."""
    recorded: Mapping[str, Any] = artifact.manifest["metrics"]["datasets"]
    order = [source["name"] for source in artifact.manifest["config"]["sources"]]
    return {name: dict(recorded[name]) for name in sorted(recorded, key=order.index)}


def check_dataset(artifact: Artifact, dataset: str) -> None:
    """Refuse a data set that `prepare` did not make.

    Raises:
        UserError: naming those there are.
    """
    known = dataset_info(artifact)
    if dataset not in known:
        raise UserError(f"data set {dataset!r} is not in {artifact.uri}; it holds {', '.join(known)}.")


def read_corpus(artifact: Artifact, dataset: str) -> pa.Table:
    """The corpus of a data set, `CORPUS_SCHEMA`."""
    check_dataset(artifact, dataset)
    return read_table(artifact.path(dataset, "corpus.parquet"))


def read_examples(artifact: Artifact, dataset: str, split: str) -> list[TrainingExample]:
    """The examples of one split (train, dev, test) of a data set."""
    check_dataset(artifact, dataset)
    if split not in SPLITS:
        raise UserError(f"split {split!r} of {dataset}: choose one of {', '.join(SPLITS)}.")
    return list(examples_of(read_table(artifact.path(dataset, f"examples-{split}.parquet"))))
