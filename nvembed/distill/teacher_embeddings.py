"""The `teacher_embeddings` step: embeddings of the training texts by the teacher, each text embedded once.

`vectors/part-*.parquet` is the student's training data; on `holdout/part-*.parquet` its cosine to the teacher is
measured. Rows: `key, text, instruction, vector`, the column `instruction` being the rendered prompt. Train queries have
the data set's prompt; documents have none; both texts of classes and graded pairs have it. Texts of the dev and test
splits are left out (see `held_out_texts`).
Which texts are taken under `max_texts`, and which are the holdout, is a seeded hash of the text. A killed run reuses
its vector shards, which are under `checkpoints/` until the step is complete.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from nvembed.core import storage
from nvembed.core.parquet import iter_parquet, list_shards, read_table
from nvembed.core.steps import Step, StepResult
from nvembed.core.vectors import table_matrix, vector_table, write_shard, write_text_shards
from nvembed.data.tables import CORPUS, HELD_OUT, SPLITS, dataset_info, document_text, examples_file
from nvembed.distill.config import TeacherEmbeddingsConfig
from nvembed.retrieval.encode import encode_shards
from nvembed.text.identity import folded_hash, text_digest, text_key
from nvembed.types import Artifact, TaskType, UserError

logger = logging.getLogger(__name__)

PARTS = ("vectors", "holdout")


def _build(config: TeacherEmbeddingsConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    prepare = inputs["prepare"]
    held_out = held_out_texts(prepare)
    counts: Counter[str] = Counter()
    choice = choose_texts(
        np.fromiter(
            (text_digest(text, prefix) for text, prefix in training_texts(prepare, held_out, counts)), np.int64
        ),
        config,
    )
    texts, encoded = (storage.join(work_uri, "checkpoints", name) for name in ("texts", "encoded"))
    rows = {}
    taken = {part: Counter[str]() for part in PARTS}
    for part in PARTS:
        chosen = choice.holdout if part == "holdout" else choice.training
        rows[part] = write_text_shards(
            _chosen_rows(prepare, held_out, chosen, taken[part]), storage.join(texts, part), config.encode.shard_rows
        )
    logger.info(
        "teacher_embeddings: %d texts for the student, %d held out for the cosine", rows["vectors"], rows["holdout"]
    )
    report = encode_shards(texts, inputs["model"].path("model"), encoded, config.encode)
    for name in list_shards(texts):
        _join(storage.join(texts, name), storage.join(encoded, name), storage.join(work_uri, name))
    return StepResult(
        rows=rows,
        metrics={
            "candidates": dict(counts),
            "unique_texts": choice.unique,
            "datasets": {part: dict(counts) for part, counts in taken.items()},
            "encode_rows": report.rows,
            "encode_reused_rows": report.reused_rows,
            "encode_cpu_seconds": report.cpu_seconds,
            "encode_embedded": report.embedded,
            "encode_cached": report.cached,
            "encode_rejected": report.rejected,
            "encode_workers": report.workers,
        },
    )


TEACHER_EMBEDDINGS = Step("teacher_embeddings", 2, _build, cleared=False)


# -- which texts ------------------------------------------------------------------------------------------------------


def held_out_texts(prepare: Artifact) -> frozenset[int]:
    """Hashes of the texts that must not reach the student, over all data sets of a `prepare` artifact.

    Held-out queries; texts of held-out classes and pairs; documents that answer held-out queries only. Case and white
    space do not count, so such a text is left out of every data set.
    """
    hashes: set[int] = set()
    for dataset in dataset_info(prepare):
        answers = {split: _positives(prepare, dataset, split) for split in SPLITS}
        held_out_only = {key for split in HELD_OUT for key in answers[split]} - answers["train"]
        for split in HELD_OUT:
            hashes.update(folded_hash(query) for query in _queries(prepare, dataset, split))
        for key, text, own_split in _corpus(prepare, dataset):
            if own_split in HELD_OUT or key in held_out_only:
                hashes.add(folded_hash(text))
    return frozenset(hashes)


def training_texts(
    prepare: Artifact, held_out: frozenset[int], counts: Counter[str] | None = None
) -> Iterator[tuple[str, str]]:
    """(text, instruction) of every training text of a student, repeats included; streamed.

    Args:
        counts: gets how many texts were taken and how many were left out as dev or test texts.
    """
    counts = Counter() if counts is None else counts
    return ((text, instruction) for _, text, instruction in _named_texts(prepare, held_out, counts))


def _named_texts(prepare: Artifact, held_out: frozenset[int], counts: Counter[str]) -> Iterator[tuple[str, str, str]]:
    """(data set, text, instruction), see `training_texts`."""
    for dataset, info in dataset_info(prepare).items():
        instruction, symmetric = info["instruction"], TaskType(info["task"]).symmetric
        for text in _queries(prepare, dataset, "train"):
            if folded_hash(text) in held_out:
                counts["held_out_text"] += 1
                continue
            counts["queries"] += 1
            yield dataset, text, instruction
        for _, text, _ in _corpus(prepare, dataset):
            if folded_hash(text) in held_out:
                counts["held_out_text"] += 1
                continue
            counts["documents"] += 1
            yield dataset, text, instruction if symmetric else ""


def _queries(prepare: Artifact, dataset: str, split: str) -> Iterator[str]:
    for table in iter_parquet(prepare.path(dataset, examples_file(split)), ["query"]):
        yield from table.column("query").to_pylist()


def _positives(prepare: Artifact, dataset: str, split: str) -> set[str]:
    tables = iter_parquet(prepare.path(dataset, examples_file(split)), ["positives"])
    return {item["id"] for table in tables for row in table.column("positives").to_pylist() for item in row}


def _corpus(prepare: Artifact, dataset: str) -> Iterator[tuple[str, str, str | None]]:
    """(id, text, split)."""
    for table in iter_parquet(prepare.path(dataset, CORPUS), ["id", "title", "text", "split"]):
        for row in table.to_pylist():
            yield row["id"], document_text(row["title"], row["text"]), row["split"]


# -- the choice -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Sorted digests of the texts taken."""

    training: np.ndarray
    holdout: np.ndarray
    unique: int


def choose_texts(digest_N: np.ndarray, config: TeacherEmbeddingsConfig) -> Choice:
    """Under `max_texts` those with the smallest seeded hash; of these, the first `holdout_share` is the holdout.

    Raises:
        UserError: fewer than two texts.
    """
    unique_U = np.unique(digest_N)
    hash_U = np.array([xxhash.xxh3_64_intdigest(digest.tobytes(), config.seed) for digest in unique_U], dtype=np.uint64)
    ordered = unique_U[np.lexsort((unique_U, hash_U))][: config.max_texts]
    if len(ordered) < 2:
        raise UserError(
            f"teacher_embeddings: the training split has {len(ordered)} texts; a student needs some to learn from."
        )
    count = min(max(1, round(config.holdout_share * len(ordered))), len(ordered) - 1)
    return Choice(np.sort(ordered[count:]), np.sort(ordered[:count]), len(unique_U))


def _chosen_rows(
    prepare: Artifact, held_out: frozenset[int], chosen: np.ndarray, by_dataset: Counter[str]
) -> Iterator[tuple[str, str, str]]:
    """(key, text, instruction) of the chosen texts, each once, in file order.

    Args:
        by_dataset: gets how many came from each data set (the first that has the text).
    """
    taken = np.zeros(len(chosen), dtype=bool)
    for dataset, text, instruction in _named_texts(prepare, held_out, Counter()):
        digest = text_digest(text, instruction)
        place = int(np.searchsorted(chosen, digest))
        if place < len(chosen) and chosen[place] == digest and not taken[place]:
            taken[place] = True
            by_dataset[dataset] += 1
            yield text_key(text, instruction), text, instruction


def _join(texts_uri: str, vectors_uri: str, out_uri: str) -> None:
    """One shard of texts with its vectors."""
    texts = read_table(texts_uri, ["key", "text", "instruction"])
    vectors = read_table(vectors_uri)
    assert texts.column("key").equals(vectors.column("key"))
    # always fp32 here, in whatever type the working shards and the cache store them
    teacher = vector_table(vectors.column("key"), table_matrix(vectors))
    table = texts.append_column("vector", teacher.column("vector"))
    write_shard(table.replace_schema_metadata(None), out_uri)


def read_part(
    teacher_embeddings: Artifact, part: str, limit: int | None = None
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Rows (`key, text, instruction`) and vectors float32 [N, D] of the first `limit` rows of a part."""
    tables: list[pa.Table] = []
    count = 0
    for name in list_shards(teacher_embeddings.path(part)):
        tables.append(read_table(teacher_embeddings.path(part, name)))
        count += tables[-1].num_rows
        if limit is not None and count >= limit:
            break
    table = pa.concat_tables(tables).slice(0, limit).combine_chunks()
    flat = table.column("vector").combine_chunks()
    matrix_ND = np.asarray(flat.flatten().to_numpy(zero_copy_only=False)).reshape(table.num_rows, -1)
    return table.select(["key", "text", "instruction"]).to_pylist(), matrix_ND
