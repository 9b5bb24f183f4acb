"""Tables of the `prepare` artifact: schemas and readers.

`<prepare>/<dataset>/corpus.parquet` holds the documents, `examples-{train,dev,test}.parquet` the examples, whose
positives and negatives are ids into that corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from nvembed.core.parquet import read_table
from nvembed.types import Artifact, ScoredId, TaskType, TrainingExample, UserError

SPLITS = ("train", "dev", "test")
HELD_OUT = ("dev", "test")
# of each data set, in the artifacts of `prepare` (with `examples_file`) and `mine`
CORPUS, MINED, SEARCHED = "corpus.parquet", "mined.parquet", "searched.parquet"
BEIR_CORPUS, BEIR_QUERIES = "corpus.jsonl", "queries.jsonl"  # of a BEIR folder

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

    `split` is that of a text that is itself an item (classification, sts) or answers held-out queries only
    (retrieval); other retrieval documents leave it null.
    """

    id: str
    title: str
    text: str
    label: str | None = None
    split: str | None = None


def document_text(title: str, text: str) -> str:
    """The text of a corpus row that is embedded and searched: title and text with one space between, as BEIR does."""
    return f"{title} {text}".strip() if title else text


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


def examples_file(split: str) -> str:
    """Name of the file with the examples of a split."""
    return f"examples-{split}.parquet"


# -- the prepare artifact ---------------------------------------------------------------------------------------------


def dataset_info(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Records of data sets in `prepare`'s manifest, in the recipe's order: task, instruction, split rule, counts."""
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
    return read_table(artifact.path(dataset, CORPUS))


def read_examples(artifact: Artifact, dataset: str, split: str) -> list[TrainingExample]:
    """The examples of one split (train, dev, test) of a data set."""
    check_dataset(artifact, dataset)
    if split not in SPLITS:
        raise UserError(f"split {split!r} of {dataset}: choose one of {', '.join(SPLITS)}.")
    return list(examples_of(read_table(artifact.path(dataset, examples_file(split)))))
