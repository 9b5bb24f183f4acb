"""The inputs of mining: texts written as shards, texts without a vector, and the tasks of the actors.

Under `<work>/checkpoints/texts/<dataset>/`: `queries/part-*.parquet` (one row per training example that has a positive,
with what is known about it) and `documents/part-*.parquet`. The same inputs give the same bytes, so a restarted run
finds its vectors still valid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core import storage
from nvembed.core.parquet import iter_parquet
from nvembed.core.vectors import write_shard_tables
from nvembed.data.tables import document_text
from nvembed.mining.config import MineConfig
from nvembed.mining.lists import filtered, flat, kept, owners, places
from nvembed.text.identity import text_hash
from nvembed.types import Artifact, TaskType

TEXT_KINDS = ("queries", "documents")  # folders of a data set's shards
NEEDED = ("key", "positives", "own")  # columns of queries that decide which examples are left
STS_NEVER = 0.5  # pairs graded above this are never negatives, though not positives either (NV-Embed v1: <= 2.5 of 5)

QUERY_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("text", pa.string()),
        ("instruction", pa.string()),
        ("hash", pa.int64()),
        ("positives", pa.list_(pa.string())),
        ("own", pa.int32()),
        ("never", pa.list_(pa.string())),
        ("given", pa.list_(pa.string())),
    ]
)
DOCUMENT_SCHEMA = pa.schema(
    [("key", pa.string()), ("text", pa.string()), ("instruction", pa.string()), ("hash", pa.int64())]
)


@dataclass(frozen=True)
class MinePaths:
    """Working directories of one `mine` step.

    Attributes:
        texts, search, select: shards of texts, what was searched, what was selected.
        vectors: of the first retriever; see `vectors_of`.
        searched: output of the step that searched: this one, or the one that is selected from again.
    """

    texts: str
    vectors: str
    search: str
    select: str
    searched: str

    @classmethod
    def under(cls, work_uri: str, reuse: str | None = None) -> MinePaths:
        """The directories below a step's `checkpoints/`."""
        root = storage.join(work_uri, "checkpoints")
        texts, vectors, search, select = (storage.join(root, name) for name in ("texts", "vectors", "search", "select"))
        return cls(texts, vectors, search, select, reuse or work_uri)

    def vectors_of(self, model: int | str) -> str:
        """Vectors of a retriever, by number, or of the "candidate_filter"."""
        return self.vectors if model == 0 else f"{self.vectors}_{model}"


# -- texts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetLayout:
    """Counts of one data set: training examples, queries and documents written, examples left out by reason."""

    examples: int
    queries: int
    documents: int
    dropped: Mapping[str, int]


def lay_out(prepare: Artifact, dataset: str, info: Mapping[str, Any], config: MineConfig, uri: str) -> DatasetLayout:
    """Write the query and document shards of one retrieval or sts data set under `uri`."""
    task = TaskType(info["task"])
    examples_uri = prepare.path(dataset, "examples-train.parquet")
    shared = _positives_of_repeated_queries(examples_uri, task, config)
    counts: Counter[str] = Counter()
    tables = _queries(examples_uri, task, info["instruction"], config, shared, counts)
    queries, documents = write_shard_tables(tables, storage.join(uri, "queries"), config.encode.shard_rows), 0
    if queries:
        tables = _documents(prepare.path(dataset, "corpus.parquet"), info["instruction"] if task.symmetric else "")
        documents = write_shard_tables(tables, storage.join(uri, "documents"), config.encode.shard_rows)
    examples = counts.pop("examples", 0)
    return DatasetLayout(examples, queries, documents, dict(sorted(counts.items())))


def positives_and_never(items: list[dict[str, Any]], task: TaskType, config: MineConfig) -> tuple[list[str], list[str]]:
    """Ids that count as positives of an example, and ids that must not be its negatives (a superset)."""
    if task is not TaskType.STS:
        ids = [item["id"] for item in items]
        return ids, ids
    positives = [item["id"] for item in items if (item["score"] or 0.0) >= config.sts_positive]
    close = [item["id"] for item in items if (item["score"] or 0.0) > STS_NEVER]
    return positives, positives + close


def _positives_of_repeated_queries(
    uri: str, task: TaskType, config: MineConfig
) -> dict[int, tuple[set[str], set[str]]]:
    """(positives, never) by query hash, for query texts that several examples share.

    The rows are read twice: memory is eight bytes per example plus the repeated ones.
    """
    hashes = [
        np.array([text_hash(text) for text in table.column("query").to_pylist()], dtype=np.int64)
        for table in iter_parquet(uri, ["query"])
    ]
    values, counts = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *hashes]), return_counts=True)
    shared: dict[int, tuple[set[str], set[str]]] = {int(value): (set(), set()) for value in values[counts > 1]}
    if not shared:
        return {}
    for table, hash_N in zip(iter_parquet(uri, ["positives"]), hashes, strict=True):
        for digest, items in zip(hash_N, table.column("positives").to_pylist(), strict=True):
            if int(digest) in shared:
                positives, never = positives_and_never(items, task, config)
                shared[int(digest)][0].update(positives)
                shared[int(digest)][1].update(never)
    return shared


def _queries(
    uri: str,
    task: TaskType,
    instruction: str,
    config: MineConfig,
    shared: Mapping[int, tuple[set[str], set[str]]],
    counts: Counter[str],
) -> Iterator[pa.Table]:
    for table in iter_parquet(uri, ["id", "query", "positives", "negatives"]):
        rows = []
        for row in table.to_pylist():
            counts["examples"] += 1
            own, never = positives_and_never(row["positives"], task, config)
            if not own:
                counts["graded_below_sts_positive" if task is TaskType.STS else "without_positive"] += 1
                continue
            digest = text_hash(row["query"])
            all_positives, all_never = shared.get(digest, (set(own), set(never)))
            rows.append(
                {
                    "key": row["id"],
                    "text": row["query"],
                    "instruction": instruction,
                    "hash": digest,
                    # The example's own first; the rest are positives of the same query text in other examples.
                    "positives": own + sorted(all_positives - set(own)),
                    "never": sorted(all_never),
                    "given": [item["id"] for item in row["negatives"]],
                    "own": len(own),
                }
            )
        yield pa.Table.from_pylist(rows, schema=QUERY_SCHEMA)


def _documents(uri: str, instruction: str) -> Iterator[pa.Table]:
    for table in iter_parquet(uri, ["id", "title", "text", "split"]):
        rows = []
        for row in table.to_pylist():
            if row["split"] not in (None, "train"):  # a text of the dev or test split is no negative
                continue
            text = document_text(row["title"], row["text"])
            rows.append({"key": row["id"], "text": text, "instruction": instruction, "hash": text_hash(text)})
        yield pa.Table.from_pylist(rows, schema=DOCUMENT_SCHEMA)


# -- texts without a vector -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rejected:
    """Keys of a data set's texts that a model of the step could not embed.

    A document without a vector is no negative and no positive; an example whose query has none, or none of whose own
    positives has one, is left out. `<dataset>/rejected.json` in the step's output names them (only where there are
    some), so selecting again sees the same examples.
    """

    queries: pa.Array
    documents: pa.Array

    @classmethod
    def of(cls, reasons: dict[str, dict[str, str]]) -> Rejected:
        """From key -> reason by kind of text."""
        return cls(*(pa.array(sorted(reasons.get(kind, {})), pa.string()) for kind in TEXT_KINDS))

    @classmethod
    def read(cls, root_uri: str, dataset: str) -> Rejected:
        """From a step's output."""
        uri = storage.join(root_uri, dataset, "rejected.json")
        return cls.of(storage.read_json(uri) if storage.exists(uri) else {})

    def __len__(self) -> int:
        return len(self.queries) + len(self.documents)

    def dropped(self, queries: pa.Table) -> dict[str, int]:
        """How many examples are left out, by reason (columns `NEEDED`)."""
        has_query_Q, _, own_Q = self._left(queries)
        counts = {"query_rejected": ~has_query_Q, "positives_rejected": has_query_Q & (own_Q == 0)}
        return {reason: int(count_Q.sum()) for reason, count_Q in counts.items() if count_Q.any()}

    def without(self, queries: pa.Table) -> pa.Table:
        """The usable examples, without their rejected documents.

        Args:
            queries: columns `NEEDED` and perhaps others; `never` stays as it is.

        Returns:
            The examples that have a query and a positive of their own.
        """
        if not len(self):
            return queries
        has_query_Q, present_P, own_Q = self._left(queries)
        columns = {name: queries.column(name) for name in queries.column_names}
        columns["positives"] = kept(queries.column("positives"), present_P)
        columns["own"] = pa.array(own_Q, pa.int32())
        if "given" in columns:
            columns["given"] = kept(columns["given"], ~_among(flat(columns["given"])[1], self.documents))
        return pa.table(columns).filter(pa.array(has_query_Q & (own_Q > 0)))

    def _left(self, queries: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """bool [Q]: queries with a vector; bool [P]: positives with one; int64 [Q]: how many of its own each has."""
        start_Q, ids = flat(queries.column("positives"))
        present_P, owner_P = ~_among(ids, self.documents), owners(start_Q)
        own_P = places(start_Q) < queries.column("own").to_numpy().astype(np.int64)[owner_P]
        own_Q = np.diff(filtered(start_Q, own_P & present_P))
        return ~_among(queries.column("key"), self.queries), present_P, own_Q


def write_rejected(root_uri: str, dataset: str, reasons: dict[str, dict[str, str]]) -> None:
    """Name what was rejected (key -> reason by kind of text) in a step's output; nothing where nothing was."""
    uri = storage.join(root_uri, dataset, "rejected.json")
    named = {kind: dict(sorted(by_key.items())) for kind, by_key in reasons.items() if by_key}
    if named:
        storage.write_json(uri, named)
    elif storage.exists(uri):
        storage.remove(uri)


def _among(values: pa.Array | pa.ChunkedArray, keys: pa.Array) -> np.ndarray:
    return np.asarray(pc.is_in(values, value_set=keys)).astype(bool)


# -- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Work of an actor on one group of rows of a data set.

    Attributes:
        dataset, group: names of the data set and of the group's files.
        rows: of the group.
    """

    dataset: str
    group: str
    rows: int


@dataclass(frozen=True)
class QueryTask(Task):
    """Work on a group of queries, those of `shards`."""

    shards: Sequence[str]


@dataclass(frozen=True)
class SearchTask(QueryTask):
    """Search one part of a corpus for a group of queries; the task that completes the group selects as well.

    Attributes:
        segment: the part of the corpus; None: all are searched, only the selection is missing.
        segments: parts of the corpus.
        documents: shards of the part.
        corpus: documents of the whole corpus.
    """

    segment: int | None
    segments: int
    documents: Sequence[str]
    corpus: int


@dataclass(frozen=True)
class ReuseTask(QueryTask):
    """Select again for a group of queries from what an earlier step searched, from its row `start` on."""

    start: int


@dataclass(frozen=True)
class RandomTask(QueryTask):
    """Draw negatives for a group of queries from `corpus` documents."""

    corpus: int


@dataclass(frozen=True)
class ClassesTask(Task):
    """Draw example-based pairs for rows of the file `examples` from row `start` on."""

    examples: str
    start: int


_TASKS: dict[str, type[Task]] = {kind.__name__: kind for kind in (SearchTask, ReuseTask, RandomTask, ClassesTask)}


def task_to_json(task: Task) -> dict[str, Any]:
    """A task as it travels to an actor."""
    return {"type": type(task).__name__, **asdict(task)}


def task_from_json(row: Mapping[str, Any]) -> Task:
    """The inverse of `task_to_json`, with lists for tuples."""
    return _TASKS[row["type"]](**{name: value for name, value in row.items() if name != "type"})
