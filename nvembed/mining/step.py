"""The `mine` step: negatives for every training example of every data set of a `prepare` artifact.

Retrieval and sts sets: all texts of all sets are encoded in one actor pool; then groups of queries are searched against
parts of their corpus, each part a task, and the rule selects from the results of all parts (`worker.py`). Sets with
classes or clusters get example-based pairs. With an input `model`, a trained one, that model is the first retriever.
Only train examples are read. Writes `<dataset>/mined.parquet`, `<dataset>/searched.parquet` (from which another rule
can select, see `reuse`) and `audit.json`. A killed run continues: text, vector, search and selection files under
`checkpoints/` are written atomically and stay valid while their inputs do.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet as pq

from nvembed.core import storage
from nvembed.core.model_cache import local_model
from nvembed.core.parquet import column_size, iter_parquet, list_shards, read_table
from nvembed.core.ray_tasks import ProgressLog, run_pool
from nvembed.core.steps import Step, StepResult
from nvembed.data.tables import dataset_info
from nvembed.mining.audit import Audit, near_duplicates, samples, short_summary
from nvembed.mining.config import Bm25Retriever, MineConfig, RandomNegatives
from nvembed.mining.finish import check_reuse, index_recall, join_groups
from nvembed.mining.layout import (
    NEEDED,
    TEXT_KINDS,
    ClassesTask,
    DatasetLayout,
    MinePaths,
    RandomTask,
    Rejected,
    ReuseTask,
    SearchTask,
    Task,
    lay_out,
    task_to_json,
    write_rejected,
)
from nvembed.mining.search import Searcher
from nvembed.mining.worker import MineWorker
from nvembed.retrieval.ann import check_faiss
from nvembed.retrieval.bm25 import check_memory
from nvembed.retrieval.config import ExactIndex, PretrainedModel
from nvembed.retrieval.encode import EncodeReport, encode_shards, read_rejected
from nvembed.retrieval.encoders import check_model
from nvembed.types import Artifact, TaskType, UserError

logger = logging.getLogger(__name__)

_AUDITED_TEXTS = 200  # examples whose texts are compared for the audit


def mine_step(encode: Callable[..., EncodeReport] = encode_shards, pool: Callable[..., Any] = run_pool) -> Step:
    """The `mine` step.

    Args:
        encode: makes vector shards of text shards; see `encode_shards`.
        pool: runs the tasks of `MineWorker`; see `run_pool`.
    """
    return Step("mine", 2, functools.partial(_build, encode=encode, pool=pool), cleared=False)


def _build(
    config: MineConfig,
    inputs: Mapping[str, Artifact],
    work_uri: str,
    *,
    encode: Callable[..., EncodeReport],
    pool: Callable[..., Any],
) -> StepResult:
    prepare = inputs["prepare"]
    if "model" in inputs:  # mining again: the trained model is the first retriever
        trained = PretrainedModel(name=inputs["model"].path("model"), instruction=True)
        config = config.model_copy(update={"retriever": trained, "reuse": None})
    paths = MinePaths.under(work_uri, config.reuse)
    searched = not isinstance(config.rule, RandomNegatives)
    _check(config, prepare, searched)
    info = dataset_info(prepare)
    layouts: dict[str, DatasetLayout] = {}
    for dataset in info:
        if not _example_based(info[dataset]):
            one = lay_out(prepare, dataset, info[dataset], config, storage.join(paths.texts, dataset))
            logger.info("mine: %s: %d queries, %d documents", dataset, one.queries, one.documents)
            layouts[dataset] = one
    reports = _encode(config, paths, encode) if searched and config.reuse is None else {}
    for dataset, one in layouts.items():
        layouts[dataset] = _without_rejected(config, paths, dataset, one, reports, work_uri)
    tasks: list[Task] = []
    for dataset in info:
        if dataset in layouts:
            tasks += query_tasks(paths, dataset, config, layouts[dataset].documents)
        else:
            tasks += class_tasks(prepare.path(dataset, "examples-train.parquet"), dataset, config)
    select_workers, again = _select(config, paths, tasks, pool)
    summaries, rows = {}, {}
    for dataset in info:
        groups = list(dict.fromkeys(task.group for task in tasks if task.dataset == dataset))
        audit = Audit()
        for group in groups:
            audit.merge(storage.read_json(storage.join(paths.select, dataset, f"{group}.json")))
        rows[dataset] = join_groups(config, paths, dataset, groups, work_uri, audit)
        summaries[dataset] = audit.summary(config.rule.type, info[dataset]["task"], layouts.get(dataset))
        if dataset in layouts and reports:
            summaries[dataset]["encoded"] = {place: _counts(report, dataset) for place, report in reports.items()}
        rows_for_texts = _first_rows(work_uri, dataset, _AUDITED_TEXTS)
        summaries[dataset]["near_duplicates"] = near_duplicates(prepare, dataset, rows_for_texts)
        if searched and dataset in layouts and not isinstance(config.search.index, ExactIndex):
            summaries[dataset]["index_recall"] = index_recall(Searcher(config, paths), dataset, work_uri)
    retriever = config.retriever.model_dump(mode="json")
    if "model" in inputs:  # by what it is, not by where it lies: the same run elsewhere gives the same bytes
        retriever = {"type": "trained", "model": inputs["model"].manifest_hash}
    _write_audit(config, prepare, info, summaries, work_uri, retriever if searched else None)
    return StepResult(rows=rows, metrics=_metrics(summaries, reports, select_workers, again))


MINE = mine_step()


def _metrics(
    summaries: Mapping[str, Any], reports: Mapping[str, EncodeReport], select_workers: Mapping[str, int], again: int
) -> dict[str, Any]:
    report = EncodeReport()
    for one in reports.values():
        report.merge(one)
    return {
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


def _check(config: MineConfig, prepare: Artifact, searched: bool) -> None:
    """Refuse wrong settings before any text is written."""
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
            if not _example_based(info):  # on a cluster, the actors check their own nodes
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


# -- texts ------------------------------------------------------------------------------------------------------------


def _vectors(paths: MinePaths, place: str) -> str:
    """Vectors of a model by its place in the recipe's section."""
    if place.startswith("more_retrievers."):
        return paths.vectors_of(1 + int(place.rsplit(".", 1)[1]))
    return paths.vectors_of(0 if place == "retriever" else "candidate_filter")


def _encode(config: MineConfig, paths: MinePaths, encode: Callable[..., EncodeReport]) -> dict[str, EncodeReport]:
    """Vectors of all texts by every embedder, one after another; by the model's place in the recipe's section."""
    return {
        place: encode(paths.texts, model, _vectors(paths, place), config.encode, may_reject=TEXT_KINDS)
        for place, model in config.embedders()
    }


def _without_rejected(
    config: MineConfig,
    paths: MinePaths,
    dataset: str,
    layout: DatasetLayout,
    reports: Mapping[str, EncodeReport],
    work_uri: str,
) -> DatasetLayout:
    """Write what the models rejected into the output, and count the examples that are left out for it."""
    if reports:
        reasons: dict[str, dict[str, str]] = {kind: {} for kind in TEXT_KINDS}
        for (place, report), kind in itertools.product(reports.items(), TEXT_KINDS):
            folder = f"{dataset}/{kind}"
            if folder in report.folders and report.folders[folder].rejected:
                reasons[kind] |= read_rejected(storage.join(_vectors(paths, place), folder))
        write_rejected(work_uri, dataset, reasons)
    rejected = Rejected.read(paths.searched, dataset)
    if not len(rejected):
        return layout
    counts: Counter[str] = Counter()
    root = storage.join(paths.texts, dataset, "queries")
    for name in list_shards(root):
        counts.update(rejected.dropped(read_table(storage.join(root, name), list(NEEDED))))
    return replace(layout, queries=layout.queries - sum(counts.values()), dropped={**layout.dropped, **counts})


# -- tasks ------------------------------------------------------------------------------------------------------------


class QueryGroup(NamedTuple):
    """Some shards of queries, their rows, and the number of rows before them."""

    shards: tuple[str, ...]
    rows: int
    start: int


def query_groups(paths: MinePaths, dataset: str, config: MineConfig) -> list[QueryGroup]:
    """Queries that are searched and selected together."""
    root = storage.join(paths.texts, dataset, "queries")
    names, rejected = list_shards(root), Rejected.read(paths.searched, dataset)
    if len(rejected):
        counts = [int(rejected.usable(read_table(storage.join(root, name), list(NEEDED))).sum()) for name in names]
    else:
        counts = [_row_count(storage.join(root, name)) for name in names]
    limit = min(config.search.query_rows, max(-(-sum(counts) // config.encode.actors), 1))
    groups: list[QueryGroup] = []
    for name, count in zip(names, counts, strict=True):
        if not count:
            continue
        if groups and groups[-1].rows + count <= limit:
            shards, rows, start = groups.pop()
            groups.append(QueryGroup((*shards, name), rows + count, start))
        else:
            groups.append(QueryGroup((name,), count, groups[-1].start + groups[-1].rows if groups else 0))
    return groups


def corpus_segments(root: str, config: MineConfig) -> tuple[list[tuple[str, ...]], int]:
    """Shards of the corpus by part, at most `document_rows` documents each, and how many documents there are."""
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
    return [tuple(names) for names in segments], total


def query_tasks(paths: MinePaths, dataset: str, config: MineConfig, documents: int) -> list[Task]:
    """The tasks of a data set with queries: those of a group follow each other."""
    tasks: list[Task] = []
    segments: list[tuple[str, ...]] = []
    corpus, searched = documents, config.reuse is None and not isinstance(config.rule, RandomNegatives)
    groups = query_groups(paths, dataset, config)
    if groups and searched:  # every shard is opened for its rows
        segments, corpus = corpus_segments(storage.join(paths.texts, dataset, "documents"), config)
    for number, (shards, rows, start) in enumerate(groups):
        common = (dataset, f"part-{number:05d}", rows, shards)
        if isinstance(config.rule, RandomNegatives):
            tasks.append(RandomTask(*common, corpus))
        elif config.reuse is not None:
            tasks.append(ReuseTask(*common, start, config.reuse))
        else:
            tasks += [
                SearchTask(*common, segment, len(segments), names, corpus) for segment, names in enumerate(segments)
            ]
    return tasks


def class_tasks(examples: str, dataset: str, config: MineConfig) -> list[Task]:
    """The tasks of a data set with labels."""
    total, rows = _row_count(examples), config.search.query_rows
    return [
        ClassesTask(dataset, f"part-{number:05d}", min(rows, total - start), examples, start)
        for number, start in enumerate(range(0, total, rows))
    ]


def _row_count(uri: str) -> int:
    with storage.open_reader(uri) as file:
        return int(pq.read_metadata(file).num_rows)


def _select(
    config: MineConfig, paths: MinePaths, tasks: Sequence[Task], pool: Callable[..., Any]
) -> tuple[dict[str, int], int]:
    """Run the tasks that an earlier run has not completed; rows by worker, and queries searched again in fp32."""
    waiting = _waiting(config, paths, tasks)
    total = {(task.dataset, task.group): task.rows for task in waiting}
    if not isinstance(config.search.index, ExactIndex):  # an index is built once for all groups that an actor gets
        waiting.sort(key=lambda task: (task.dataset, task.segment or 0 if isinstance(task, SearchTask) else 0))
    progress = ProgressLog("select", sum(total.values()), "queries")
    workers: dict[str, int] = {}
    again = 0
    results = pool(
        MineWorker,
        {"config": config, "paths": paths},
        [task_to_json(task) for task in waiting],
        actors=config.encode.actors,
        cpus=config.encode.cpus_per_actor,
        gpus=config.encode.gpus_per_actor if config.search.device != "cpu" else 0.0,
    )
    for result in results:
        workers[result["worker"]] = workers.get(result["worker"], 0) + result["rows"]
        again += result["again"]
        progress.add(result["rows"])
    left = _waiting(config, paths, waiting)
    assert not left, f"{len(left)} groups were searched and not selected"
    return dict(sorted(workers.items())), again


def _waiting(config: MineConfig, paths: MinePaths, tasks: Sequence[Task]) -> list[Task]:
    """Tasks without a result: parts of the corpus not searched yet, or a selection after the last of them."""
    searcher = Searcher(config, paths)
    waiting: list[Task] = []
    written: dict[str, set[str]] = {}
    for (dataset, group), of_group in itertools.groupby(tasks, key=lambda task: (task.dataset, task.group)):
        if dataset not in written:
            written[dataset] = set(storage.list_directory(storage.join(paths.select, dataset)))
        if f"{group}.parquet" in written[dataset]:
            continue
        parts = list(of_group)
        first = parts[0]
        if isinstance(first, SearchTask):
            left = set(searcher.segments_left(first))
            parts = [task for task in parts if isinstance(task, SearchTask) and task.segment in left]
            parts = parts or [replace(first, segment=None)]
        waiting += parts
    return waiting


# -- audit ------------------------------------------------------------------------------------------------------------


def _example_based(info: Mapping[str, Any]) -> bool:
    return TaskType(info["task"]) in (TaskType.CLASSIFICATION, TaskType.CLUSTERING)


def _counts(report: EncodeReport, dataset: str) -> dict[str, Any]:
    """Counts of a data set's texts, for the audit."""
    folders = {kind: f"{dataset}/{kind}" for kind in TEXT_KINDS}
    return {kind: report.folders[folder].counts() for kind, folder in folders.items() if folder in report.folders}


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


def _first_rows(work_uri: str, dataset: str, count: int) -> list[dict[str, Any]]:
    tables = iter_parquet(storage.join(work_uri, dataset, "mined.parquet"), batch_rows=count)
    return [row for table in itertools.islice(tables, 1) for row in table.to_pylist()]
