"""The `mine` step: negatives for every training example of every data set of a `prepare` artifact.

Retrieval and sts sets: all texts of all sets are encoded in one actor pool, then each group of queries is searched
exactly against its whole corpus and the rule selects (`mining/selection.py`). Classes and clusters get example-based
pairs. Only train examples are read. Writes `<dataset>/mined.parquet` and `audit.json`. A killed run continues: text,
vector and selection shards under `checkpoints/` are written atomically and kept while they match.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq

from nvembed import storage
from nvembed.data.tables import dataset_info
from nvembed.mining.audit import Audit, samples, short_summary
from nvembed.mining.config import MineConfig, RandomNegatives
from nvembed.mining.layout import Laid, lay_out
from nvembed.mining.miner import MINED_SCHEMA, MinePaths, MineWorker
from nvembed.retrieval.encode import EncodeReport, encode_shards
from nvembed.retrieval.encoders import check_model
from nvembed.retrieval.pool import ProgressLog, run_pool
from nvembed.retrieval.shards import list_shards, read_table
from nvembed.storage import Step, StepResult
from nvembed.types import Artifact, TaskType

logger = logging.getLogger(__name__)

GROUP_ROWS = 8192  # queries that share one pass over the documents


def _build(config: MineConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    prepare = inputs["prepare"]
    paths = MinePaths.under(work_uri)
    searched = not isinstance(config.rule, RandomNegatives)
    if searched:
        check_model(config.miner)
    info = dataset_info(prepare)
    laid: dict[str, Laid] = {}
    for dataset in info:
        if _example_based(info[dataset]):
            continue
        laid[dataset] = lay_out(prepare, dataset, info[dataset], config, storage.join(paths.texts, dataset))
        logger.info("mine: %s: %d queries, %d documents", dataset, laid[dataset].queries, laid[dataset].documents)
    report = EncodeReport()
    if searched:  # a document without a vector is nobody's negative; a query's would be missed
        report = encode_shards(paths.texts, config.miner, paths.vectors, config.encode, may_reject=("documents",))
    tasks = _tasks(prepare, info, config, paths, searched)
    select_workers = _select(config, paths, tasks)
    summaries = {}
    rows = {}
    for dataset in info:
        parts = [task["part"] for task in tasks if task["dataset"] == dataset]
        rows[dataset] = _merge(paths, dataset, parts, work_uri)
        summaries[dataset] = _summary(config, paths, dataset, info[dataset], parts, laid.get(dataset))
    audit = {
        "miner": config.miner.model_dump(mode="json") if searched else None,
        "rule": config.rule.model_dump(mode="json"),
        "depth": config.depth,
        "num_negatives": config.num_negatives,
        "datasets": summaries,
    }
    if config.audit_samples:
        audit["samples"] = {
            dataset: samples(prepare, dataset, _first_rows(work_uri, dataset, config.audit_samples)) for dataset in info
        }
    storage.write_json(storage.join(work_uri, "audit.json"), audit)
    metrics = {
        "datasets": {dataset: short_summary(summary) for dataset, summary in summaries.items()},
        # Which process did what differs from run to run; hence here and not in a file of the artifact.
        "encode_workers": report.workers,
        "encode_rows": report.rows,
        "encode_reused_rows": report.reused_rows,
        "encode_cpu_seconds": report.cpu_seconds,
        "encode_embedded": report.embedded,
        "encode_cached": report.cached,
        "encode_rejected": report.rejected,
        "select_workers": select_workers,
    }
    return StepResult(rows=rows, metrics=metrics)


MINE = Step("mine", 1, _build, cleared=False)


def _example_based(info: Mapping[str, Any]) -> bool:
    return TaskType(info["task"]) in (TaskType.CLASSIFICATION, TaskType.CLUSTERING)


def _tasks(
    prepare: Artifact, info: Mapping[str, Any], config: MineConfig, paths: MinePaths, searched: bool
) -> list[dict[str, Any]]:
    """Groups of queries. Results do not depend on the grouping (search is exact, draws are seeded per example)."""
    tasks: list[dict[str, Any]] = []
    for dataset in info:
        if _example_based(info[dataset]):
            examples = prepare.path(dataset, "examples-train.parquet")
            total = _row_count(examples)
            groups: list[dict[str, Any]] = [
                {"way": "classes", "examples": examples, "start": start, "rows": min(GROUP_ROWS, total - start)}
                for start in range(0, total, GROUP_ROWS)
            ]
        else:
            root = storage.join(paths.texts, dataset, "queries")
            names = list_shards(root)
            counts = [_row_count(storage.join(root, name)) for name in names]
            limit = min(GROUP_ROWS, max(-(-sum(counts) // config.encode.actors), 1))
            way = "search" if searched else "random"
            groups = []
            for name, count in zip(names, counts, strict=True):
                if not groups or groups[-1]["rows"] + count > limit:
                    groups.append({"way": way, "shards": [], "rows": 0})
                groups[-1]["shards"].append(name)
                groups[-1]["rows"] += count
        for number, group in enumerate(groups):
            tasks.append({**group, "dataset": dataset, "part": f"part-{number:05d}"})
    return tasks


def _select(config: MineConfig, paths: MinePaths, tasks: list[dict[str, Any]]) -> dict[str, int]:
    """Run the selection tasks that an earlier run has not completed; rows by worker."""
    waiting = [
        task
        for task in tasks
        if not storage.exists(storage.join(paths.select, task["dataset"], f"{task['part']}.parquet"))
    ]
    progress = ProgressLog("select", sum(task["rows"] for task in waiting), "queries")
    workers: dict[str, int] = {}
    pool = run_pool(
        MineWorker,
        {"config": config, "paths": paths},
        waiting,
        actors=config.encode.actors,
        cpus=config.encode.cpus_per_actor,
    )
    for result in pool:
        workers[result["worker"]] = workers.get(result["worker"], 0) + result["rows"]
        progress.add(result["rows"])
    return dict(sorted(workers.items()))


def _merge(paths: MinePaths, dataset: str, parts: list[str], work_uri: str) -> int:
    """Write `<dataset>/mined.parquet` from the parts in order, one part in memory at a time."""
    fs, path = storage.filesystem(storage.join(work_uri, dataset, "mined.parquet"))
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    rows = 0
    with fs.open(path, "wb") as file, pq.ParquetWriter(file, MINED_SCHEMA, compression="zstd") as writer:
        for part in parts:
            table = read_table(storage.join(paths.select, dataset, f"{part}.parquet"))
            writer.write_table(table.cast(MINED_SCHEMA))
            rows += table.num_rows
    return rows


def _summary(
    config: MineConfig, paths: MinePaths, dataset: str, info: Mapping[str, Any], parts: list[str], laid: Laid | None
) -> dict[str, Any]:
    audit = Audit()
    for part in parts:
        audit.merge(storage.read_json(storage.join(paths.select, dataset, f"{part}.json")))
    if laid is None:
        alone = audit.counts["alone_in_its_class"]
        dropped: Mapping[str, int] = {"alone_in_its_class": alone} if alone else {}
        examples = audit.counts["mined"] + alone
        way = "example-based: positive of the same class, negatives of other classes, drawn at random"
    else:
        dropped, examples = laid.dropped, laid.examples
        way = "random" if isinstance(config.rule, RandomNegatives) else "mined, positive-aware"
    return audit.summary(task=info["task"], way=way, examples=examples, dropped=dropped)


def _first_rows(work_uri: str, dataset: str, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (
        read_table(storage.join(work_uri, dataset, "mined.parquet")).slice(0, count).to_pylist()
    )
    return rows


def _row_count(uri: str) -> int:
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        return int(pq.read_metadata(file).num_rows)
