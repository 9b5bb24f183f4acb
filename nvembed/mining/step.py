"""The `mine` step: negatives for every training example of every data set of a `prepare` artifact.

Retrieval and sts sets: all texts of all sets are encoded in one actor pool; then groups of queries are searched against
parts of their corpus, each part a task (`search.py`), and the rule selects from what all parts hold (`choosing.py`).
Classes and clusters get example-based pairs. With an input `model`, a trained one, it mines in the first retriever's
place. Only train examples are read. Writes `<dataset>/mined.parquet`, `<dataset>/searched.parquet` (what another rule
can be applied to, see `reuse`) and `audit.json`. A killed run goes on: text, vector, search and selection files under
`checkpoints/` are written atomically and kept while they match.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import psutil
import pyarrow.parquet as pq

from nvembed.core import storage
from nvembed.core.model_cache import local_model
from nvembed.core.ray_pool import ProgressLog, run_pool
from nvembed.core.steps import Step, StepResult
from nvembed.core.vectors import column_size, iter_parquet, list_shards, read_table
from nvembed.data.tables import dataset_info
from nvembed.mining.audit import Audit, near_duplicates, samples, short_summary
from nvembed.mining.config import Bm25Retriever, MineConfig, RandomNegatives
from nvembed.mining.finish import check_reuse, index_recall, merge_parts
from nvembed.mining.layout import Laid, lay_out
from nvembed.mining.rejected import NEEDED, SIDES, Rejected, write_rejected
from nvembed.mining.search import MinePaths, Searcher
from nvembed.mining.worker import MineWorker
from nvembed.retrieval.ann import check_faiss
from nvembed.retrieval.bm25 import check_memory
from nvembed.retrieval.config import ExactIndex, PretrainedModel
from nvembed.retrieval.encode import EncodeReport, encode_shards, read_rejected
from nvembed.retrieval.encoders import check_model
from nvembed.types import Artifact, TaskType, UserError

logger = logging.getLogger(__name__)

_AUDITED_TEXTS = 200  # examples whose texts are compared for the audit
_WAYS = {
    "topk": "mined, best-scored",
    "topk_shifted": "mined, ranks passed over",
    "topk_abs": "mined, below a fixed score",
    "topk_margin_pos": "mined, positive-aware",
    "topk_perc_pos": "mined, positive-aware",
    "rank_window": "mined, a window of ranks",
    "sampled_topk": "mined, drawn from the best",
}


def _build(config: MineConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    prepare = inputs["prepare"]
    if "model" in inputs:  # mining again: the trained model takes the first retriever's place
        trained = PretrainedModel(name=inputs["model"].path("model"), instruction=True)
        config = config.model_copy(update={"retriever": trained, "reuse": None})
    paths = MinePaths.under(work_uri, config.reuse)
    searched = not isinstance(config.rule, RandomNegatives)
    _check(config, prepare, searched)
    info = dataset_info(prepare)
    laid: dict[str, Laid] = {}
    for dataset in info:
        if _example_based(info[dataset]):
            continue
        laid[dataset] = lay_out(prepare, dataset, info[dataset], config, storage.join(paths.texts, dataset))
        logger.info("mine: %s: %d queries, %d documents", dataset, laid[dataset].queries, laid[dataset].documents)
    reports = _encode(config, paths) if searched and config.reuse is None else {}
    for dataset, one in laid.items():
        laid[dataset] = _without_rejected(config, paths, dataset, one, reports, work_uri)
    report = EncodeReport()
    for one_report in reports.values():
        report.merge(one_report)
    tasks = _tasks(prepare, info, config, paths, laid)
    select_workers, again = _select(config, paths, tasks)
    summaries = {}
    rows = {}
    for dataset in info:
        parts = list(dict.fromkeys(task["part"] for task in tasks if task["dataset"] == dataset))
        audit = Audit()
        for part in parts:
            audit.merge(storage.read_json(storage.join(paths.select, dataset, f"{part}.json")))
        rows[dataset] = merge_parts(config, paths, dataset, parts, work_uri, audit)
        summaries[dataset] = _summary(config, audit, info[dataset], laid.get(dataset))
        encoded = {place: _sides(told, dataset) for place, told in reports.items()}
        if dataset in laid and encoded:
            summaries[dataset]["encoded"] = encoded
        shown = _first_rows(work_uri, dataset, _AUDITED_TEXTS)
        summaries[dataset]["near_duplicates"] = near_duplicates(prepare, dataset, shown)
        if searched and dataset in laid and not isinstance(config.search.index, ExactIndex):
            summaries[dataset]["index_recall"] = index_recall(Searcher(config, paths), dataset, work_uri)
    retriever = config.retriever.model_dump(mode="json")
    if "model" in inputs:  # by what it is, not by where it lies: the same run elsewhere gives the same bytes
        retriever = {"type": "trained", "model": inputs["model"].manifest_hash}
    _write_audit(config, prepare, info, summaries, work_uri, retriever if searched else None)
    metrics = {
        "datasets": {dataset: short_summary(summary) for dataset, summary in summaries.items()},
        # Which process did what differs from run to run; hence here and not in a file of the artifact.
        "encode_workers": report.workers,
        "encode_rows": report.rows,
        "encode_reused_rows": report.reused_rows,
        "encode_cpu_seconds": report.cpu_seconds,
        "encode_embedded": report.embedded,
        "encode_cached": report.cached,
        "encode_rejected": dict(sorted(report.rejected.items())),
        "select_workers": select_workers,
        "searched_again_in_fp32": again,
    }
    return StepResult(rows=rows, metrics=metrics)


MINE = Step("mine", 2, _build, cleared=False)


def _check(config: MineConfig, prepare: Artifact, searched: bool) -> None:
    """What can be refused before anything is laid out."""
    if not searched:
        return
    if config.reuse is not None:
        check_reuse(config, prepare)
        return
    check_faiss(config.search.index)
    if any(isinstance(retriever, Bm25Retriever) for retriever in config.more_retrievers) and not os.environ.get(
        "RAY_ADDRESS"
    ):
        for dataset, info in dataset_info(prepare).items():
            if not _example_based(info):  # what a cluster's nodes have is asked there
                size = column_size(prepare.path(dataset, "corpus.parquet"), "text")
                check_memory(dataset, *size, psutil.virtual_memory().total)
    for _, model in config.embedders():
        check_model(model)
    if config.cross_encoder is not None:
        folder = local_model(config.cross_encoder.name, config.cross_encoder.revision)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"mine.candidate_filter.model: {folder} is no model folder (no config.json). Check the path."
            )


def _lane(place: str) -> int | str:
    """The lane of a model by its place in the recipe's section."""
    if place.startswith("more_retrievers."):
        return 1 + int(place.rsplit(".", 1)[1])
    return 0 if place == "retriever" else "candidate_filter"


def _encode(config: MineConfig, paths: MinePaths) -> dict[str, EncodeReport]:
    """Vectors of all texts by every embedder, one after another; by the model's place in the recipe's section."""
    return {
        place: encode_shards(paths.texts, model, paths.lane_vectors(_lane(place)), config.encode, may_reject=SIDES)
        for place, model in config.embedders()
    }


def _without_rejected(
    config: MineConfig, paths: MinePaths, dataset: str, laid: Laid, reports: Mapping[str, EncodeReport], work_uri: str
) -> Laid:
    """Note what the models rejected in the output, and count the examples that are left out for it."""
    if reports:
        reasons: dict[str, dict[str, str]] = {side: {} for side in SIDES}
        for (place, report), side in itertools.product(reports.items(), SIDES):
            folder = f"{dataset}/{side}"
            if folder in report.folders and report.folders[folder].rejected:
                reasons[side] |= read_rejected(storage.join(paths.lane_vectors(_lane(place)), folder))
        write_rejected(work_uri, dataset, reasons)
    rejected = Rejected.read(paths.searched, dataset)
    if not len(rejected):
        return laid
    counts: Counter[str] = Counter()
    root = storage.join(paths.texts, dataset, "queries")
    for name in list_shards(root):
        counts.update(rejected.dropped(read_table(storage.join(root, name), list(NEEDED))))
    return replace(laid, queries=laid.queries - sum(counts.values()), dropped={**laid.dropped, **counts})


def _sides(report: EncodeReport, dataset: str) -> dict[str, Any]:
    """What is told of a data set's texts, for the audit."""
    return {
        side: report.folders[f"{dataset}/{side}"].counts() for side in SIDES if f"{dataset}/{side}" in report.folders
    }


def _write_audit(
    config: MineConfig,
    prepare: Artifact,
    info: Mapping[str, Any],
    summaries: Mapping[str, Any],
    work_uri: str,
    retriever: Mapping[str, Any] | None,
) -> None:
    audit = {
        "retriever": retriever,
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


def _example_based(info: Mapping[str, Any]) -> bool:
    return TaskType(info["task"]) in (TaskType.CLASSIFICATION, TaskType.CLUSTERING)


def _tasks(
    prepare: Artifact, info: Mapping[str, Any], config: MineConfig, paths: MinePaths, laid: Mapping[str, Laid]
) -> list[dict[str, Any]]:
    """Parts of the work. Results do not depend on the division (search is exact, draws are seeded per example)."""
    tasks: list[dict[str, Any]] = []
    for dataset in info:
        segments, corpus = None, 0
        if _example_based(info[dataset]):
            examples = prepare.path(dataset, "examples-train.parquet")
            groups = _class_groups(examples, config)
        else:
            groups = _query_groups(paths, dataset, config)
        for number, group in enumerate(groups):
            group |= {"dataset": dataset, "part": f"part-{number:05d}"}
            if group["way"] == "random":
                group["corpus"] = laid[dataset].documents
            if group["way"] != "search":
                tasks.append(group)
                continue
            if segments is None:  # once a data set: every shard is opened for its rows
                segments, corpus = _document_segments(storage.join(paths.texts, dataset, "documents"), config)
            for segment, names in enumerate(segments):
                part = {"segment": segment, "segments": len(segments), "documents": names, "corpus": corpus}
                tasks.append({**group, **part})
    return tasks


def _class_groups(examples: str, config: MineConfig) -> list[dict[str, Any]]:
    total, rows = _row_count(examples), config.search.query_rows
    return [
        {"way": "classes", "examples": examples, "start": start, "rows": min(rows, total - start)}
        for start in range(0, total, rows)
    ]


def _query_groups(paths: MinePaths, dataset: str, config: MineConfig) -> list[dict[str, Any]]:
    root = storage.join(paths.texts, dataset, "queries")
    names, rejected = list_shards(root), Rejected.read(paths.searched, dataset)
    if len(rejected):
        counts = [int(rejected.kept(read_table(storage.join(root, name), list(NEEDED))).sum()) for name in names]
    else:
        counts = [_row_count(storage.join(root, name)) for name in names]
    limit = min(config.search.query_rows, max(-(-sum(counts) // config.encode.actors), 1))
    way = "search" if config.reuse is None else "reuse"
    if isinstance(config.rule, RandomNegatives):
        way = "random"
    groups: list[dict[str, Any]] = []
    start = 0
    for name, count in zip(names, counts, strict=True):
        if not count:
            continue
        if not groups or groups[-1]["rows"] + count > limit:
            groups.append({"way": way, "shards": [], "rows": 0, "start": start, "reuse": config.reuse})
        groups[-1]["shards"].append(name)
        groups[-1]["rows"] += count
        start += count
    return groups


def _document_segments(root: str, config: MineConfig) -> tuple[list[list[str]], int]:
    """Shards of the corpus by task, at most `document_rows` documents each, and how many documents there are."""
    segments: list[list[str]] = []
    rows = total = 0
    for name in list_shards(root):
        count = _row_count(storage.join(root, name))
        if not segments or rows + count > config.search.document_rows:
            segments.append([])
            rows = 0
        segments[-1].append(name)
        rows += count
        total += count
    return segments, total


def _select(config: MineConfig, paths: MinePaths, tasks: list[dict[str, Any]]) -> tuple[dict[str, int], int]:
    """Run the tasks that an earlier run has not completed; rows by worker, and queries searched again in fp32."""
    waiting = _waiting(config, paths, tasks)
    total = {(task["dataset"], task["part"]): task["rows"] for task in waiting}
    if not isinstance(config.search.index, ExactIndex):  # an index is built once for all groups that an actor gets
        waiting.sort(key=lambda task: (task["dataset"], task.get("segment") or 0))
    progress = ProgressLog("select", sum(total.values()), "queries")
    workers: dict[str, int] = {}
    again = 0
    pool = run_pool(
        MineWorker,
        {"config": config, "paths": paths},
        waiting,
        actors=config.encode.actors,
        cpus=config.encode.cpus_per_actor,
        gpus=config.encode.gpus_per_actor if config.search.device != "cpu" else 0.0,
    )
    for result in pool:
        workers[result["worker"]] = workers.get(result["worker"], 0) + result["rows"]
        again += result["again"]
        progress.add(result["rows"])
    left = _waiting(config, paths, waiting)
    assert not left, f"{len(left)} groups were searched and not selected"
    return dict(sorted(workers.items())), again


def _waiting(config: MineConfig, paths: MinePaths, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tasks whose result is not there: parts of the corpus not searched yet, or a selection after the last of them."""
    searcher = Searcher(config, paths)
    waiting: list[dict[str, Any]] = []
    selected: dict[str, set[str]] = {}
    for _, group in itertools.groupby(tasks, key=lambda task: (task["dataset"], task["part"])):
        parts = list(group)
        dataset = parts[0]["dataset"]
        if dataset not in selected:
            selected[dataset] = set(storage.list_directory(storage.join(paths.select, dataset)))
        if f"{parts[0]['part']}.parquet" in selected[dataset]:
            continue
        if parts[0]["way"] == "search":
            left = set(searcher.left(parts[0]))
            parts = [task for task in parts if task["segment"] in left] or [{**parts[0], "segment": None}]
        waiting += parts
    return waiting


def _summary(config: MineConfig, audit: Audit, info: Mapping[str, Any], laid: Laid | None) -> dict[str, Any]:
    if laid is None:
        alone = audit.counts["alone_in_its_class"]
        dropped: Mapping[str, int] = {"alone_in_its_class": alone} if alone else {}
        examples = audit.counts["mined"] + alone
        way = "example-based: positive of the same class, negatives of other classes, drawn at random"
    else:
        dropped, examples = laid.dropped, laid.examples
        if audit.counts["inconsistent"]:
            dropped = {**dropped, "positive_ranks_too_low": audit.counts["inconsistent"]}
        way = "random" if isinstance(config.rule, RandomNegatives) else _WAYS[config.rule.type]
    return audit.summary(task=info["task"], way=way, examples=examples, dropped=dropped)


def _first_rows(work_uri: str, dataset: str, count: int) -> list[dict[str, Any]]:
    tables = iter_parquet(storage.join(work_uri, dataset, "mined.parquet"), batch_rows=count)
    return [row for table in itertools.islice(tables, 1) for row in table.to_pylist()]


def _row_count(uri: str) -> int:
    with storage.open_reader(uri) as file:
        return int(pq.read_metadata(file).num_rows)
