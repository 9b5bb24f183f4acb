"""The `mine` step: negatives for every training example of every data set of a `prepare` artifact.

Retrieval and sts sets: all texts of all sets are encoded in one actor pool; then groups of queries are searched against
parts of their corpus, each part a task, and the rule selects from the results of all parts (`worker.py`). Sets with
classes or clusters get example-based pairs. With an input `model`, a trained one, that model is the first retriever.
Only train examples are read. Writes `<dataset>/mined.parquet`, `<dataset>/searched.parquet` (from which another rule
can select, see `reuse`) and `audit.json`. A killed run continues: text, vector, search and selection files under
`checkpoints/` are written atomically and stay valid while their inputs do.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil

from nvembed.core import storage
from nvembed.core.model_cache import local_model
from nvembed.core.parquet import column_size, count_rows, list_shards, read_slice, read_table
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

    def build(config: MineConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
        return _Run(config, inputs, work_uri).result(encode, pool)

    return Step("mine", 2, build, cleared=False)


MINE = mine_step()


class _Run:
    """One run of the step."""

    def __init__(self, config: MineConfig, inputs: Mapping[str, Artifact], work_uri: str) -> None:
        self.prepare, self.info, self.work_uri = inputs["prepare"], dataset_info(inputs["prepare"]), work_uri
        self.retriever = config.retriever.model_dump(mode="json")
        if "model" in inputs:  # mining again: the trained model is the first retriever
            trained = PretrainedModel(name=inputs["model"].path("model"), instruction=True)
            config = config.model_copy(update={"retriever": trained, "reuse": None})
            # by what it is, not by where it lies: the same run elsewhere gives the same bytes
            self.retriever = {"type": "trained", "model": inputs["model"].manifest_hash}
        self.config, self.paths = config, MinePaths.under(work_uri, config.reuse)
        self.searched = not isinstance(config.rule, RandomNegatives)
        labelled = (TaskType.CLASSIFICATION, TaskType.CLUSTERING)
        self.with_queries = [name for name, info in self.info.items() if TaskType(info["task"]) not in labelled]

    def result(self, encode: Callable[..., EncodeReport], pool: Callable[..., Any]) -> StepResult:
        """Write the step's files; see `mine_step`."""
        config, paths = self.config, self.paths
        if self.searched:
            self._check()
        layouts: dict[str, DatasetLayout] = {}
        for dataset in self.with_queries:
            uri = storage.join(paths.texts, dataset)
            layouts[dataset] = one = lay_out(self.prepare, dataset, self.info[dataset], config, uri)
            logger.info("mine: %s: %d queries, %d documents", dataset, one.queries, one.documents)
        reports: dict[str, EncodeReport] = {}
        for place, model in config.embedders() if self.searched and config.reuse is None else ():
            reports[place] = encode(paths.texts, model, _vectors(paths, place), config.encode, may_reject=TEXT_KINDS)
        layouts = {dataset: self._without_rejected(dataset, layouts[dataset], reports) for dataset in layouts}
        tasks: list[Task] = []
        for dataset in self.info:
            if dataset in layouts:
                tasks += query_tasks(paths, dataset, config, layouts[dataset].documents)
            else:
                tasks += class_tasks(self.prepare.path(dataset, "examples-train.parquet"), dataset, config)
        select_workers, again = _select(config, paths, tasks, pool)
        summaries, rows = {}, {}
        for dataset in self.info:
            groups = list(dict.fromkeys(task.group for task in tasks if task.dataset == dataset))
            audit = Audit()
            for group in groups:
                audit.merge(storage.read_json(storage.join(paths.select, dataset, f"{group}.json")))
            rows[dataset] = join_groups(config, paths, dataset, groups, self.work_uri, audit)
            summaries[dataset] = self._summary(dataset, audit, layouts.get(dataset), reports)
        self._write_audit(summaries)
        return StepResult(rows=rows, metrics=_metrics(summaries, reports, select_workers, again))

    def _check(self) -> None:
        """Refuse wrong settings before any text is written."""
        config, prepare = self.config, self.prepare
        if config.reuse is not None:
            check_reuse(config, prepare)
            return
        check_faiss(config.search.index)
        uses_bm25 = any(isinstance(retriever, Bm25Retriever) for retriever in config.more_retrievers)
        if uses_bm25 and not os.environ.get("RAY_ADDRESS"):  # on a cluster, the actors check their own nodes
            for dataset in self.with_queries:
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

    def _without_rejected(
        self, dataset: str, layout: DatasetLayout, reports: Mapping[str, EncodeReport]
    ) -> DatasetLayout:
        """Write what the models rejected into the output, and count the examples that are left out for it."""
        if reports:
            reasons: dict[str, dict[str, str]] = {kind: {} for kind in TEXT_KINDS}
            for (place, report), kind in itertools.product(reports.items(), TEXT_KINDS):
                folder = f"{dataset}/{kind}"
                if folder in report.folders and report.folders[folder].rejected:
                    reasons[kind] |= read_rejected(storage.join(_vectors(self.paths, place), folder))
            write_rejected(self.work_uri, dataset, reasons)
        rejected = Rejected.read(self.paths.searched, dataset)
        if not len(rejected):
            return layout
        counts: Counter[str] = Counter()
        root = storage.join(self.paths.texts, dataset, "queries")
        for name in list_shards(root):
            counts.update(rejected.dropped(read_table(storage.join(root, name), NEEDED)))
        return replace(layout, queries=layout.queries - counts.total(), dropped={**layout.dropped, **counts})

    def _summary(
        self, dataset: str, audit: Audit, layout: DatasetLayout | None, reports: Mapping[str, EncodeReport]
    ) -> dict[str, Any]:
        """A data set's part of the audit."""
        summary = audit.summary(self.config.rule.type, self.info[dataset]["task"], layout)
        if layout is not None and reports:
            summary["encoded"] = {place: _counts(report, dataset) for place, report in reports.items()}
        summary["near_duplicates"] = near_duplicates(self.prepare, dataset, self._first_rows(dataset, _AUDITED_TEXTS))
        if self.searched and layout is not None and not isinstance(self.config.search.index, ExactIndex):
            summary["index_recall"] = index_recall(Searcher(self.config, self.paths), dataset, self.work_uri)
        return summary

    def _write_audit(self, summaries: Mapping[str, Any]) -> None:
        config = self.config
        audit = {
            "retriever": self.retriever if self.searched else None,
            "rule": config.rule.model_dump(mode="json"),
            "depth": config.depth,
            "num_negatives": config.num_negatives,
            "datasets": summaries,
        }
        if config.audit_samples:
            audit["samples"] = {
                dataset: samples(self.prepare, dataset, self._first_rows(dataset, config.audit_samples))
                for dataset in self.info
            }
        storage.write_json(storage.join(self.work_uri, "audit.json"), audit)

    def _first_rows(self, dataset: str, count: int) -> list[dict[str, Any]]:
        rows = read_slice(storage.join(self.work_uri, dataset, "mined.parquet"), 0, count)
        return list(rows.to_pylist())


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


def _counts(report: EncodeReport, dataset: str) -> dict[str, Any]:
    """Counts of a data set's texts, for the audit."""
    folders = {kind: f"{dataset}/{kind}" for kind in TEXT_KINDS}
    return {kind: report.folders[folder].counts() for kind, folder in folders.items() if folder in report.folders}


def _vectors(paths: MinePaths, place: str) -> str:
    """Vectors of a model by its place in the recipe's section."""
    if place.startswith("more_retrievers."):
        return paths.vectors_of(1 + int(place.rsplit(".", 1)[1]))
    return paths.vectors_of(0 if place == "retriever" else "candidate_filter")


# -- tasks ------------------------------------------------------------------------------------------------------------


Part = tuple[tuple[str, ...], int]  # successive shards, and how many rows they have


def _packed(shards: Iterable[tuple[str, int]], limit: int) -> list[Part]:
    """Shards, by name and rows, in parts of at most `limit` rows, or of one shard."""
    parts: list[Part] = []
    for name, rows in shards:
        if parts and parts[-1][1] + rows <= limit:
            names, before = parts.pop()
            parts.append(((*names, name), before + rows))
        else:
            parts.append(((name,), rows))
    return parts


def query_groups(paths: MinePaths, dataset: str, config: MineConfig) -> list[Part]:
    """Queries that are searched and selected together; rows that are left out for a rejected text do not count."""
    root = storage.join(paths.texts, dataset, "queries")
    names, rejected = list_shards(root), Rejected.read(paths.searched, dataset)
    if len(rejected):
        rows = [rejected.without(read_table(storage.join(root, name), NEEDED)).num_rows for name in names]
    else:
        rows = [count_rows(storage.join(root, name)) for name in names]
    limit = min(config.search.query_rows, max(-(-sum(rows) // config.encode.actors), 1))
    return _packed(((name, count) for name, count in zip(names, rows, strict=True) if count), limit)


def corpus_parts(root: str, config: MineConfig) -> list[Part]:
    """Documents that are searched at a time."""
    shards = ((name, count_rows(storage.join(root, name))) for name in list_shards(root))
    return _packed(shards, config.search.document_rows)


def query_tasks(paths: MinePaths, dataset: str, config: MineConfig, documents: int) -> list[Task]:
    """The tasks of a data set with queries: those of a group follow each other."""
    tasks: list[Task] = []
    searched, start = config.reuse is None and not isinstance(config.rule, RandomNegatives), 0
    groups, parts = query_groups(paths, dataset, config), []
    if groups and searched:  # every shard is opened for its rows
        parts = corpus_parts(storage.join(paths.texts, dataset, "documents"), config)
    for number, (shards, rows) in enumerate(groups):
        common = (dataset, f"part-{number:05d}", rows, shards)
        if isinstance(config.rule, RandomNegatives):
            tasks.append(RandomTask(*common, documents))
        elif config.reuse is not None:
            tasks.append(ReuseTask(*common, start))
        else:
            tasks += [SearchTask(*common, part, len(parts), names, documents) for part, (names, _) in enumerate(parts)]
        start += rows
    return tasks


def class_tasks(examples: str, dataset: str, config: MineConfig) -> list[Task]:
    """The tasks of a data set with labels."""
    total, rows = count_rows(examples), config.search.query_rows
    return [
        ClassesTask(dataset, f"part-{number:05d}", min(rows, total - start), examples, start)
        for number, start in enumerate(range(0, total, rows))
    ]


def _select(
    config: MineConfig, paths: MinePaths, tasks: Sequence[Task], pool: Callable[..., Any]
) -> tuple[dict[str, int], int]:
    """Run the tasks that an earlier run has not completed; rows by worker, and queries searched again in fp32."""
    waiting = _waiting(config, paths, tasks)
    total = sum({(task.dataset, task.group): task.rows for task in waiting}.values())
    if not isinstance(config.search.index, ExactIndex):  # an index is built once for all groups that an actor gets
        waiting.sort(key=lambda task: (task.dataset, task.segment or 0 if isinstance(task, SearchTask) else 0))
    progress = ProgressLog("select", total, "queries")
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
    datasets = {task.dataset for task in tasks}
    selected = {dataset: set(storage.list_directory(storage.join(paths.select, dataset))) for dataset in datasets}
    for (dataset, group), of_group in itertools.groupby(tasks, key=lambda task: (task.dataset, task.group)):
        if f"{group}.parquet" in selected[dataset]:
            continue
        parts = list(of_group)
        if isinstance(first := parts[0], SearchTask):
            left = searcher.segments_left(first)
            parts = [task for task in parts if isinstance(task, SearchTask) and task.segment in left]
            parts = parts or [replace(first, segment=None)]
        waiting += parts
    return waiting
