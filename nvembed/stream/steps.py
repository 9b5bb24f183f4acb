"""The `stream` and `distill_stream` steps: laying out the training stream, whole global batches in order.

    <stream>/shards/part-*.parquet   rows in (step, slot) order, one row group per optimiser step

The global batch exists before it is divided over ranks; the position in the data is the step number.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core import storage
from nvembed.core.messages import nearest
from nvembed.core.parquet import list_shards, read_schema, read_table, write_table
from nvembed.core.steps import Step, StepResult
from nvembed.data.tables import CORPUS, MINED, dataset_info, examples_file
from nvembed.stream.config import DistillStreamConfig, StreamConfig
from nvembed.stream.layout import (
    DISTILL_PLAN_SCHEMA,
    PLAN_SCHEMA,
    ContrastiveLayout,
    DatasetFiles,
    DistillLayout,
    lay_out_shards,
    plan_uri,
    truncated_shares,
)
from nvembed.stream.reader import StreamReader
from nvembed.stream.sampling import Population, mixture, permutation, slots
from nvembed.text.identity import document_key, signed_hash
from nvembed.types import Artifact, TaskType, UserError

__all__ = ["DISTILL_STREAM", "STREAM", "StreamReader"]

logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 4096  # examples; bounds the memory of laying out and of reading


# -- contrastive ------------------------------------------------------------------------------------------------------


def _build_stream(config: StreamConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    info = _checked_datasets(config, inputs["prepare"])
    files = {name: _files(name, info[name], inputs) for name in config.weights}
    candidates = {name: _read_candidates(files[name].mined_uri) for name in config.weights}
    candidates = {name: _capped(name, rows, config) for name, rows in candidates.items()}
    populations = [_population(name, candidates[name]) for name in config.weights]
    shares = mixture(config.weights, {item.name: len(item.keys) for item in populations}, config.size_exponent)
    batches = slots(
        populations,
        list(shares.values()),
        batch_size=config.global_batch_size,
        batching=config.batching,
        seed=config.seed,
    )
    taken: Counter[str] = Counter()

    def plan() -> Iterator[list[tuple[str, str, str, int]]]:
        for batch in itertools.islice(batches, config.steps):
            rows = []
            for slot in batch:
                name = populations[slot.dataset].name
                example_id, positives = candidates[name][slot.example]
                rows.append((name, example_id, positives[slot.positive], slot.epoch))
            taken.update(row[0] for row in rows)
            yield rows

    steps_per_shard = max(1, ROWS_PER_SHARD // config.global_batch_size)
    num_shards = _write_plan(plan(), PLAN_SCHEMA, steps_per_shard, work_uri)
    layout = ContrastiveLayout(work_uri, inputs["model"].path("model"), config.num_negatives, config.seed, files)
    lay_out_shards(layout, num_shards)
    cut = truncated_shares(work_uri, num_shards)
    storage.remove(storage.join(work_uri, ".tmp"))
    used = {
        item.name: {
            "usable": len(item.keys),
            "rows": taken[item.name],
            "epochs": taken[item.name] / len(item.keys),
            "asked": shares[item.name] / sum(shares.values()),
            "realised": taken[item.name] / taken.total(),
            **cut.get(item.name, {}),
        }
        for item in populations
    }
    for name, row in used.items():
        logger.info(
            "%s: %d usable examples, %d rows, %.2f epochs; share asked %.4f, realised %.4f",
            name, row["usable"], row["rows"], row["epochs"], row["asked"], row["realised"],
        )  # fmt: skip
    return _result(config, steps_per_shard, group_size=2 + config.num_negatives, teacher_dim=None, datasets=used)


STREAM = Step("stream", 1, _build_stream)


def _checked_datasets(config: StreamConfig, prepare: Artifact) -> dict[str, dict[str, Any]]:
    """The records of the data sets, after checking the names and values of the weights."""
    info = dataset_info(prepare)
    problems = []
    for name, weight in config.weights.items():
        if name not in info:
            problems.append(f"weights.{name}: no such data set, there are {', '.join(info)}.{nearest(name, info)}")
        if weight <= 0:
            problems.append(f"weights.{name}: {weight} is not a positive number; leave the data set out instead")
    for name in config.caps:
        if name not in config.weights:
            problems.append(f"caps.{name}: no data set of the weights, which are {', '.join(config.weights)}")
    if problems:
        raise UserError("stream: " + "; ".join(problems))
    return info


def _files(name: str, info: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> DatasetFiles:
    mined = inputs["mine"].path(name, MINED)
    if not storage.exists(mined):
        raise UserError(f"data set {name} was not mined: {mined} is missing. Run the mine step on it first.")
    return DatasetFiles(
        task=info["task"],
        symmetric=TaskType(info["task"]).symmetric and info.get("positives_from") != "labels",  # a label is no query
        instruction=info["instruction"],
        corpus_uri=inputs["prepare"].path(name, CORPUS),
        examples_uri=inputs["prepare"].path(name, examples_file("train")),
        mined_uri=mined,
    )


def _read_candidates(mined_uri: str) -> list[tuple[str, list[str]]]:
    """(example id, ids of its positives) of the mined examples that have a positive."""
    table = read_table(mined_uri, ["example_id", "positives"])
    usable = table.filter(pc.greater(pc.list_value_length(table.column("positives")), 0))
    positives = ([item["id"] for item in row] for row in usable.column("positives").to_pylist())
    return list(zip(usable.column("example_id").to_pylist(), positives, strict=True))


def _capped(name: str, candidates: list[tuple[str, list[str]]], config: StreamConfig) -> list[tuple[str, list[str]]]:
    """The examples that a cap leaves: chosen by seeded hash, in their own order."""
    cap = config.caps.get(name)
    if cap is None or len(candidates) <= cap:
        return candidates
    keys = np.array([signed_hash(name, example) for example, _ in candidates], np.int64)
    return [candidates[place] for place in np.sort(permutation(keys, signed_hash("cap", config.seed, name), 0)[:cap])]


def _population(name: str, candidates: Sequence[tuple[str, list[str]]]) -> Population:
    keys = np.array([signed_hash(name, example) for example, _ in candidates], np.int64)
    positives = [np.array([document_key(name, key) for key in row], np.int64) for _, row in candidates]
    return Population(name, keys, positives)


# -- distillation -----------------------------------------------------------------------------------------------------


def _build_distill_stream(config: DistillStreamConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    folder = inputs["teacher_embeddings"].path("vectors")
    parts = [storage.join(folder, name) for name in list_shards(folder)]
    keys = [key for part in parts for key in read_table(part, ["key"]).column("key").to_pylist()]
    dim = None
    if parts:
        dim = int(read_schema(parts[0]).field("vector").type.list_size)
    if dim is None or not keys:
        raise UserError(f"{folder} holds no teacher vectors; raise teacher_embeddings.max_texts.")
    array = np.array([signed_hash(key) for key in keys], np.int64)
    population = Population("teacher vectors", array, list(array[:, None]))
    batches = slots([population], [1.0], batch_size=config.global_batch_size, batching="homogeneous", seed=config.seed)
    plan = ([(keys[slot.example],) for slot in batch] for batch in itertools.islice(batches, config.steps))
    steps_per_shard = max(1, ROWS_PER_SHARD // config.global_batch_size)
    num_shards = _write_plan(plan, DISTILL_PLAN_SCHEMA, steps_per_shard, work_uri)
    lay_out_shards(DistillLayout(work_uri, inputs["model"].path("model"), dim, tuple(parts)), num_shards)
    storage.remove(storage.join(work_uri, ".tmp"))
    rows = config.steps * config.global_batch_size
    used = {"teacher vectors": {"usable": len(keys), "rows": rows, "epochs": rows / len(keys)}}
    logger.info("%d teacher vectors, %d rows, %.2f epochs", len(keys), rows, rows / len(keys))
    return _result(config, steps_per_shard, group_size=1, teacher_dim=dim, datasets=used)


DISTILL_STREAM = Step("distill_stream", 2, _build_distill_stream)


# -- both -------------------------------------------------------------------------------------------------------------


def _write_plan(
    batches: Iterator[Sequence[tuple[Any, ...]]], schema: pa.Schema, steps_per_shard: int, work_uri: str
) -> int:
    """Write the plan in order, one small file per shard; returns how many."""
    shard, step = 0, 0
    while block := list(itertools.islice(batches, steps_per_shard)):
        rows = []
        for batch in block:
            rows += [(step, slot, *row) for slot, row in enumerate(batch)]
            step += 1
        columns = dict(zip(schema.names, zip(*rows, strict=True), strict=True))
        write_table(
            pa.table({name: list(values) for name, values in columns.items()}, schema), plan_uri(work_uri, shard)
        )
        shard += 1
    return shard


def _result(
    config: StreamConfig | DistillStreamConfig,
    steps_per_shard: int,
    *,
    group_size: int,
    teacher_dim: int | None,
    datasets: Mapping[str, Any],
) -> StepResult:
    return StepResult(
        rows={"examples": config.steps * config.global_batch_size},
        metrics={
            "steps": config.steps,
            "global_batch_size": config.global_batch_size,
            "group_size": group_size,
            "teacher_dim": teacher_dim,
            "steps_per_shard": steps_per_shard,
            "datasets": dict(datasets),
        },
    )
