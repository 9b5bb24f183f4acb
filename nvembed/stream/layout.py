"""Laying out shards: joining texts to a plan of ids, counting tokens, writing one row group per optimiser step.

A plan says which example gets which slot (`sampling.py`): small parquet files, one per shard. The rows of examples,
mined examples and corpora that the plans need are gathered first (`join.py`), each table read once. `lay_out_shards`
then turns each plan into `shards/part-*.parquet`: by Ray Data where a cluster is connected and there is more than one
shard, else in this process. Both run `lay_out_shard`, which depends on its plan and the inputs alone: the same bytes.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core import storage
from nvembed.core.parquet import part_uri, read_table, write_table, write_tables
from nvembed.core.ray_tasks import run_tasks
from nvembed.core.retry import retried
from nvembed.core.vectors import table_matrix
from nvembed.data.tables import document_text
from nvembed.stream.join import Gather
from nvembed.stream.sampling import sample
from nvembed.text.identity import document_key, signed_hash
from nvembed.types import UserError

if TYPE_CHECKING:
    from nvembed.text.tokenise import Tokeniser

PLAN_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("slot", pa.int32()),
        ("dataset", pa.string()),
        ("example_id", pa.string()),
        ("positive_id", pa.string()),
        ("epoch", pa.int32()),
    ]
)
DISTILL_PLAN_SCHEMA = pa.schema([("step", pa.int64()), ("slot", pa.int32()), ("key", pa.string())])
STREAM_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("slot", pa.int32()),
        ("example_id", pa.string()),
        ("dataset", pa.string()),
        ("task", pa.string()),
        ("instruction", pa.string()),
        ("symmetric", pa.bool_()),
        ("texts", pa.list_(pa.string())),
        ("document_ids", pa.list_(pa.int64())),
        ("positive_ids", pa.list_(pa.int64())),
        ("token_lengths", pa.list_(pa.int32())),
    ]
)


_DOCUMENTS_SCHEMA = pa.schema([("dataset", pa.string()), ("id", pa.string())])

Cut = dict[str, dict[str, list[int]]]


def distill_schema(dim: int) -> pa.Schema:
    """Columns of a distillation stream; `dim` is the teacher's."""
    return pa.schema(
        [
            ("step", pa.int64()),
            ("slot", pa.int32()),
            ("example_id", pa.string()),
            ("text", pa.string()),
            ("instruction", pa.string()),
            ("vector", pa.list_(pa.float32(), dim)),
            ("token_lengths", pa.list_(pa.int32())),
        ]
    )


@dataclass(frozen=True)
class DatasetFiles:
    """Files with the texts and ids of one data set, and its record in `prepare`."""

    task: str
    symmetric: bool
    instruction: str
    corpus_uri: str
    examples_uri: str
    mined_uri: str


@dataclass(frozen=True)
class ContrastiveLayout:
    """All a worker needs for shards of (query, positive, negatives)."""

    work_uri: str
    model_uri: str
    num_negatives: int
    seed: int
    datasets: Mapping[str, DatasetFiles]


@dataclass(frozen=True)
class DistillLayout:
    """All a worker needs for shards of (text, instruction, teacher vector)."""

    work_uri: str
    model_uri: str
    teacher_dim: int
    parts: tuple[str, ...]


Layout = ContrastiveLayout | DistillLayout


def plan_uri(work_uri: str, shard: int) -> str:
    """URI of the plan of a shard, a working file."""
    return part_uri(work_uri, ".tmp", "plan", shard)


def shard_uri(work_uri: str, shard: int) -> str:
    """URI of a shard."""
    return part_uri(work_uri, "shards", shard)


def lay_out_shards(layout: Layout, num_shards: int) -> None:
    """Write every shard whose plan was written; order and bytes do not depend on the worker."""
    if isinstance(layout, ContrastiveLayout):
        _gather(layout, num_shards)
    else:
        plans = (read_table(plan_uri(layout.work_uri, shard), ["key"]) for shard in range(num_shards))
        _teacher_rows(layout).run(plan.column("key").to_pylist() for plan in plans)
    run_tasks(functools.partial(lay_out_shard, layout), num_shards, layout.work_uri, "shards of the stream")


@retried
def lay_out_shard(layout: Layout, shard: int) -> None:
    """Join, count tokens, write: one shard, one row group per step."""
    plan = read_table(plan_uri(layout.work_uri, shard))
    if isinstance(layout, ContrastiveLayout):
        table, cut = _contrastive_rows(plan, layout, shard)
        storage.write_json(_cut_uri(layout.work_uri, shard), cut)
    else:
        table = _distill_rows(plan, layout, shard)
    steps = table.column("step").to_numpy()
    cuts = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
    groups = [table.slice(start, end - start) for start, end in itertools.pairwise(cuts)]
    write_tables(lambda: groups, table.schema, shard_uri(layout.work_uri, shard))


# -- (query, positive, negatives) -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Joined:
    """One example of the plan with its document ids."""

    query: str
    documents: tuple[str | None, ...]  # positive, then negatives; None where there are too few
    known_positives: frozenset[str]


def _gathers(name: str, layout: ContrastiveLayout) -> dict[str, Gather]:
    """The gathers of one data set's tables."""
    files = layout.datasets[name]
    root = storage.join(layout.work_uri, ".tmp", "gathered", name)
    return {
        "examples": Gather(storage.join(root, "examples"), (files.examples_uri,), "id", ("query", "negatives")),
        "mined": Gather(
            storage.join(root, "mined"), (files.mined_uri,), "example_id", ("negatives", "known_positives")
        ),
        "corpus": Gather(storage.join(root, "corpus"), (files.corpus_uri,), "id", ("title", "text")),
    }


def _gather(layout: ContrastiveLayout, num_shards: int) -> None:
    """Examples by the plans' ids, then documents by the examples' ids, each table read once."""
    columns = ["dataset", "example_id"]
    plans = [read_table(plan_uri(layout.work_uri, shard), columns) for shard in range(num_shards)]
    for name in layout.datasets:
        ids = [plan.filter(pc.equal(plan.column("dataset"), name)).column("example_id").to_pylist() for plan in plans]
        for kind in ("examples", "mined"):
            _gathers(name, layout)[kind].run(ids)
    run_tasks(functools.partial(_list_documents, layout), num_shards, layout.work_uri, "shards' lists of documents")
    listed = [read_table(_documents_uri(layout.work_uri, shard)) for shard in range(num_shards)]
    for name in layout.datasets:
        wanted = (table.filter(pc.equal(table.column("dataset"), name)).column("id").to_pylist() for table in listed)
        _gathers(name, layout)["corpus"].run(wanted)


def _documents_uri(work_uri: str, shard: int) -> str:
    return part_uri(work_uri, ".tmp", "documents", shard)


def _list_documents(layout: ContrastiveLayout, shard: int) -> None:
    """The documents one shard needs."""
    rows = read_table(plan_uri(layout.work_uri, shard)).to_pylist()
    wanted: list[tuple[str, str]] = []
    for name, places in _places_by_dataset(rows).items():
        examples = _join_examples([rows[place] for place in places], name, layout, shard)
        wanted += [(name, key) for key in sorted(_documents_of(examples))]
    columns = {"dataset": [name for name, _ in wanted], "id": [key for _, key in wanted]}
    write_table(pa.table(columns, schema=_DOCUMENTS_SCHEMA), _documents_uri(layout.work_uri, shard))


def _places_by_dataset(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    names = sorted({row["dataset"] for row in rows})
    return {name: [place for place, row in enumerate(rows) if row["dataset"] == name] for name in names}


def _documents_of(joined: Iterable[_Joined]) -> set[str]:
    return {document for item in joined for document in item.documents if document is not None}


def _contrastive_rows(plan: pa.Table, layout: ContrastiveLayout, shard: int) -> tuple[pa.Table, Cut]:
    """Rows of `STREAM_SCHEMA` for a plan, and the texts that are longer than the model takes."""
    rows = plan.to_pylist()
    joined: dict[int, _Joined] = {}
    texts: dict[tuple[str, str], str] = {}
    for name, places in _places_by_dataset(rows).items():
        examples = _join_examples([rows[place] for place in places], name, layout, shard)
        joined.update(zip(places, examples, strict=True))
        texts.update(((name, key), text) for key, text in _document_texts(examples, name, layout, shard).items())
    columns: dict[str, list[Any]] = {field: [] for field in STREAM_SCHEMA.names}
    for place, row in enumerate(rows):
        item, name, files = joined[place], row["dataset"], layout.datasets[row["dataset"]]
        documents = [None if key is None else texts[name, key] for key in item.documents]
        known = sorted(document_key(name, key) for key in item.known_positives)
        columns["document_ids"].append([0, *(0 if key is None else document_key(name, key) for key in item.documents)])
        columns["texts"].append([item.query, *documents])
        columns["positive_ids"].append(known)
        for field, value in (("task", files.task), ("instruction", files.instruction), ("symmetric", files.symmetric)):
            columns[field].append(value)
        for field in ("step", "slot", "example_id", "dataset"):
            columns[field].append(row[field])
    tokeniser = open_tokeniser(layout.model_uri)
    whole = _group_lengths(columns["texts"], columns["instruction"], columns["symmetric"], tokeniser)
    longest = tokeniser.config.max_length
    columns["token_lengths"] = [[min(length, longest) for length in group] for group in whole]
    return pa.table(columns, schema=STREAM_SCHEMA), _count_cut(columns["dataset"], whole, longest)


def _join_examples(
    rows: Sequence[Mapping[str, Any]], name: str, layout: ContrastiveLayout, shard: int
) -> list[_Joined]:
    """Queries, negatives and known positives of a shard's rows of one data set."""
    files, gathers = layout.datasets[name], _gathers(name, layout)
    examples = {row["id"]: row for row in gathers["examples"].rows(shard).to_pylist()}
    mined = {row["example_id"]: row for row in gathers["mined"].rows(shard).to_pylist()}
    joined = []
    for row in rows:
        key = row["example_id"]
        if key not in examples:
            raise UserError(f"{files.mined_uri}: example {key} is not in {files.examples_uri}; mine again.")
        known = frozenset(mined[key]["known_positives"]) | {row["positive_id"]}
        offered = dict.fromkeys(item["id"] for item in (*examples[key]["negatives"], *mined[key]["negatives"]))
        candidates = [item for item in offered if item not in known]
        chosen: list[str | None] = list(
            sample(candidates, layout.num_negatives, signed_hash(row["dataset"], key), layout.seed, row["epoch"])
        )
        chosen += [None] * (layout.num_negatives - len(chosen))
        joined.append(_Joined(examples[key]["query"], (row["positive_id"], *chosen), known))
    return joined


def _document_texts(joined: Iterable[_Joined], name: str, layout: ContrastiveLayout, shard: int) -> dict[str, str]:
    """Texts of a shard's documents of one data set, by id."""
    table = _gathers(name, layout)["corpus"].rows(shard)
    texts = {row["id"]: document_text(row["title"], row["text"]) for row in table.to_pylist()}
    if missing := sorted(_documents_of(joined) - texts.keys()):
        uri = layout.datasets[name].corpus_uri
        raise UserError(f"{uri}: lacks {len(missing)} documents that were mined, {missing[0]} first.")
    return texts


def _group_lengths(
    texts: Iterable[Sequence[str | None]],
    instructions: Iterable[str],
    symmetric: Iterable[bool],
    tokeniser: Tokeniser,
) -> list[list[int]]:
    """Tokens of every text with its instruction, uncut; each distinct input is counted once; 0 for an absent text."""
    inputs = [
        [None if text is None else (prefix if place == 0 or both else "", text) for place, text in enumerate(group)]
        for group, prefix, both in zip(texts, instructions, symmetric, strict=True)
    ]
    distinct = list(dict.fromkeys(item for group in inputs for item in group if item is not None))
    texts_given, prefixes = [text for _, text in distinct], [prefix for prefix, _ in distinct]
    counted = tokeniser.lengths(texts_given, prefixes, cut=False).tolist()
    lengths = dict(zip(distinct, counted, strict=True))
    return [[0 if item is None else lengths[item] for item in group] for group in inputs]


def _count_cut(datasets: Sequence[str], lengths: Sequence[Sequence[int]], longest: int) -> Cut:
    """[texts, texts longer than `longest`] of queries and of documents, by data set; each use counts."""
    cut: Cut = {}
    for name, (query, *documents) in zip(datasets, lengths, strict=True):
        roles = cut.setdefault(name, {"queries": [0, 0], "documents": [0, 0]})
        for role, group in (("queries", [query]), ("documents", [length for length in documents if length])):
            roles[role][0] += len(group)
            roles[role][1] += sum(length > longest for length in group)
    return cut


def _cut_uri(work_uri: str, shard: int) -> str:
    return storage.join(work_uri, ".tmp", "cut", f"part-{shard:05d}.json")


def truncated_shares(work_uri: str, num_shards: int) -> dict[str, dict[str, float]]:
    """By data set: the share of the stream's queries and documents is cut at `max_length`."""
    total: dict[tuple[str, str], np.ndarray] = {}
    for shard in range(num_shards):
        for name, roles in storage.read_json(_cut_uri(work_uri, shard)).items():
            for role, counts in roles.items():
                total[name, role] = total.get((name, role), np.zeros(2, np.int64)) + np.array(counts)
    shares: dict[str, dict[str, float]] = {}
    for (name, role), (texts, cut) in total.items():
        shares.setdefault(name, {})[f"{role}_truncated"] = round(float(cut / max(texts, 1)), 6)
    return shares


# -- (text, instruction, teacher vector) ------------------------------------------------------------------------------


def _teacher_rows(layout: DistillLayout) -> Gather:
    folder = storage.join(layout.work_uri, ".tmp", "gathered", "teacher")
    return Gather(folder, layout.parts, "key", ("text", "instruction", "vector"))


def _distill_rows(plan: pa.Table, layout: DistillLayout, shard: int) -> pa.Table:
    """Rows of `distill_schema` for a plan."""
    gathered = _teacher_rows(layout).rows(shard)
    place = pc.index_in(plan.column("key").cast(pa.large_string()), value_set=gathered.column("key").combine_chunks())
    rows = gathered.take(place)
    vector_ND = table_matrix(rows)
    lengths = open_tokeniser(layout.model_uri).lengths(
        rows.column("text").to_pylist(), rows.column("instruction").to_pylist()
    )
    columns = {
        "step": plan.column("step"),
        "slot": plan.column("slot"),
        "example_id": rows.column("key"),
        "text": rows.column("text"),
        "instruction": rows.column("instruction"),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vector_ND.ravel()), layout.teacher_dim),
        "token_lengths": [[int(length)] for length in lengths],
    }
    return pa.table(columns, schema=distill_schema(layout.teacher_dim))


# -- tokenizer --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def open_tokeniser(model_uri: str) -> Tokeniser:
    """The tokenizer of a model folder at any URI (`load_tokeniser`); no weights are read.

    Raises:
        UserError: not a model folder of nvembed.
    """
    from nvembed.modeling.folder import load_tokeniser

    if storage.is_local(model_uri):
        return load_tokeniser(storage.local_path(model_uri))
    with tempfile.TemporaryDirectory() as folder:
        for name in storage.list_directory(model_uri):
            if storage.is_inside(name) and name.endswith((".json", ".txt", ".model", ".jinja")):
                Path(folder, name).write_bytes(storage.read_bytes(storage.join(model_uri, name)))
        try:
            return load_tokeniser(folder)
        except UserError as error:
            raise UserError(str(error).replace(folder, model_uri)) from error
