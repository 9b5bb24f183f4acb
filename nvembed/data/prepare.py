"""The `prepare` step: every source becomes a corpus and examples, split without leakage.

    <prepare>/<dataset>/corpus.parquet  examples-{train,dev,test}.parquet  [rejects.jsonl]

Order: read all sources; make texts unique; cap the held-out splits; drop duplicates inside a set (if configured); drop
near duplicates of the held-out splits from training; settle leaks of evaluation sets (where given); cap training; fit
the corpus under its cap. Every choice is by hash of ids and the seed, so it depends on nothing else.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from nvembed.core import storage
from nvembed.core.parquet import ROW_GROUP_ROWS, write_tables
from nvembed.core.steps import Step, StepResult
from nvembed.data.config import PrepareConfig, SourceConfig
from nvembed.data.dedup import decontaminate
from nvembed.data.documents import split_codes
from nvembed.data.fit import cap_examples, fit_corpus, unique_texts
from nvembed.data.sources.base import SourceRows
from nvembed.data.sources.beir import read_beir
from nvembed.data.sources.cwe import read_cwe
from nvembed.data.sources.files import read_files
from nvembed.data.sources.hpo import read_hpo_classes, read_hpo_retrieval, read_hpo_similarity
from nvembed.data.sources.hub import read_hub
from nvembed.data.sources.stdlib_code import read_stdlib_code
from nvembed.data.tables import CORPUS, CORPUS_SCHEMA, EXAMPLE_SCHEMA, HELD_OUT, SPLITS, examples_file, examples_table
from nvembed.text.instructions import instruction_prefix
from nvembed.types import Artifact, TaskType, TrainingExample, UserError

logger = logging.getLogger(__name__)

SOURCES: dict[str, Callable[[Any], SourceRows]] = {
    "cwe": read_cwe,
    "hpo_retrieval": read_hpo_retrieval,
    "hpo_classes": read_hpo_classes,
    "hpo_similarity": read_hpo_similarity,
    "stdlib_code": read_stdlib_code,
    "beir": read_beir,
    "files": read_files,
    "hub": read_hub,
}


def _build(config: PrepareConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    _check_names(config)
    prefixes = {source.name: instruction_prefix(source.instruction) for source in config.sources}
    datasets: dict[str, SourceRows] = {}
    for source in config.sources:
        datasets[source.name] = _read(source, config, work_uri)
    duplicates = {name: _deduplicate(rows, config, work_uri) for name, rows in datasets.items()}
    dropped = decontaminate.drop_near_duplicates(datasets, config.near_duplicates, work_uri, config.contained_words)
    leaks = _settle_leaks(datasets, config, work_uri)
    for source in config.sources:
        rows = datasets[source.name]
        rows.examples["train"] = cap_examples(rows.examples["train"], source.max_train, config.seed)
        fit_corpus(rows, source.max_documents, config.seed)
        _check_splits(source, rows)
    left = decontaminate.count_left(datasets, config.near_duplicates, work_uri)
    metrics: dict[str, dict[str, Any]] = {}
    for source in config.sources:
        name, rows = source.name, datasets[source.name]
        mark_held_out_documents(rows)
        _write(rows, storage.join(work_uri, name))
        metrics[name] = {
            **_describe(rows, prefixes[name]),
            "characters": _characters(rows, config.long_characters),
            "duplicates_dropped": duplicates[name],
            "near_duplicates_dropped": dropped[name],
            "near_duplicates_left": left[name],
            **leaks[name],
            "evaluation_hash": _evaluation_hash(storage.join(work_uri, name)),
        }
        logger.info(_line(name, metrics[name]))
    totals = {split: sum(row[split] for row in metrics.values()) for split in SPLITS}
    return StepResult(
        rows={**totals, "documents": sum(row["documents"] for row in metrics.values())}, metrics={"datasets": metrics}
    )


PREPARE = Step("prepare", 4, _build)


def _check_names(config: PrepareConfig) -> None:
    against = [] if config.decontaminate is None else [source.name for source in config.decontaminate.against]
    if len(set(against)) < len(against):
        raise UserError("prepare.decontaminate.against: names must differ.")
    names = [source.name for source in config.sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    odd = [name for name in names if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name)]
    if not names:
        raise UserError("prepare.sources is empty: name at least one data set.")
    if twice:
        raise UserError(f"prepare.sources: the name {', '.join(twice)} is used twice; names must differ.")
    if odd:
        raise UserError(
            f"prepare.sources: {', '.join(map(repr, odd))} cannot name a folder; use letters, digits, _ . -"
        )


def _read(source: SourceConfig, config: PrepareConfig, work_uri: str) -> SourceRows:
    """One source with malformed rows checked, texts unique, held-out splits capped."""
    started = time.perf_counter()
    rows = SOURCES[source.type](source)
    if rows.rejects.listed:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.rejects.listed)
        storage.write_bytes(storage.join(work_uri, source.name, "rejects.jsonl"), lines.encode())
        logger.warning(
            "%s: %d of %d rows are malformed and left out", source.name, rows.rejects.total, rows.rejects.rows
        )
    rows.rejects.check(source.name, config.max_reject_share)
    unique_texts(rows)
    for split in HELD_OUT:
        rows.examples[split] = cap_examples(rows.examples[split], source.max_test, config.seed)
    logger.info("%s: read in %.1f s", source.name, time.perf_counter() - started)
    return rows


def _deduplicate(rows: SourceRows, config: PrepareConfig, work_uri: str) -> dict[str, int]:
    if config.deduplicate is None:
        return {"documents": 0, "queries": 0}
    return decontaminate.deduplicate(rows, config.deduplicate, work_uri)


def _settle_leaks(datasets: dict[str, SourceRows], config: PrepareConfig, work_uri: str) -> dict[str, dict[str, Any]]:
    """Leaks of the evaluation sets into training; dropped or refused, as the recipe says."""
    decontamination = config.decontaminate
    if decontamination is None:
        return {name: {} for name in datasets}
    evaluation = {}
    for source in decontamination.against:
        rows = SOURCES[source.type](source)
        rows.rejects.check(source.name, config.max_reject_share)
        unique_texts(rows)
        evaluation[source.name] = rows
        logger.info(
            "evaluation set %s: %d held-out examples", source.name, sum(len(rows.examples[s]) for s in HELD_OUT)
        )
    leaks = decontaminate.find_leaks(datasets, evaluation, config.near_duplicates, config.contained_words, work_uri)
    dropped = decontaminate.settle_leaks(datasets, leaks, decontamination)
    reports = {name: {"leaks": leaks.of(name), "leaks_dropped": dropped[name]} for name in datasets}
    for name, row in reports.items():
        if row["leaks"]:
            logger.warning("%s: leaks of evaluation sets: %s; %d dropped", name, row["leaks"], dropped[name])
    return reports


def _characters(rows: SourceRows, long: int) -> dict[str, dict[str, float]]:
    """Lengths of queries and documents; `long_share` is the share of texts longer than `long` characters."""
    queries = [len(example.query) for split in SPLITS for example in rows.examples[split]]
    described = {}
    for role, lengths in (("queries", queries), ("documents", rows.documents.lengths())):
        length_N = np.array(lengths if len(lengths) else [0])
        described[role] = {
            "mean": round(float(length_N.mean()), 1),
            "p99": float(np.quantile(length_N, 0.99, method="lower")),
            "max": float(length_N.max()),
            "long_share": round(float((length_N > long).mean()), 6),
        }
    return described


def _check_splits(source: SourceConfig, rows: SourceRows) -> None:
    if not rows.examples["test"]:
        raise UserError(f"data set {source.name}: no held-out example is left; raise max_test or give more rows.")
    wanted = sum(len(rows.examples[split]) for split in HELD_OUT)
    if not rows.examples["train"] and source.type != "beir":
        raise UserError(
            f"data set {source.name}: no training example fits beside the {wanted} held-out ones; "
            f"raise max_documents (now {source.max_documents}) or lower max_test (now {source.max_test})."
        )


def mark_held_out_documents(rows: SourceRows) -> None:
    """Put each retrieval document that answers held-out queries only into their split, in place.

    Evaluation searches the whole corpus; mining and distillation leave the held-out splits out, so that no answer of
    the test is seen in training, not even as a negative. Distractors and shared documents belong to no split.
    """
    if rows.task is not TaskType.RETRIEVAL:
        return
    split_N = split_codes([None]).repeat(len(rows.documents))
    for split in (*HELD_OUT, "train"):
        answers = rows.documents.mask(item.id for example in rows.examples[split] for item in example.positives)
        split_N[answers] = split_codes([None if split == "train" else split])
    rows.documents = rows.documents.with_splits(split_N)


def _write(rows: SourceRows, uri: str) -> None:
    tables = functools.partial(rows.documents.tables, ROW_GROUP_ROWS)
    write_tables(tables, CORPUS_SCHEMA, storage.join(uri, CORPUS))
    for split in SPLITS:
        groups = functools.partial(_examples, rows.examples[split])
        write_tables(groups, EXAMPLE_SCHEMA, storage.join(uri, examples_file(split)))


def _examples(examples: list[TrainingExample]) -> Iterator[pa.Table]:
    """Row groups one by one: rows as dicts, from which Arrow is made, take more memory than the examples."""
    for start in range(0, max(len(examples), 1), ROW_GROUP_ROWS):
        yield examples_table(examples[start : start + ROW_GROUP_ROWS])


def _describe(rows: SourceRows, prefix: str) -> dict[str, Any]:
    return {
        "task": rows.task.value,
        "instruction": prefix,
        "split_rule": rows.split_rule,
        "synthetic": rows.synthetic,
        "positives_from": rows.positives_from,
        "licence": rows.licence,
        **{split: len(rows.examples[split]) for split in SPLITS},
        "documents": len(rows.documents),
        "documents_shared": decontaminate.shared_documents(rows),
        "rejected": rows.rejects.total,
    }


def _evaluation_hash(uri: str) -> str:
    """Changes exactly when a held-out example or the corpus it is searched in changes."""
    files = [CORPUS, *map(examples_file, HELD_OUT)]
    return storage.hash_json({file: storage.checksum(storage.join(uri, file)) for file in files})


def _line(name: str, row: Mapping[str, Any]) -> str:
    kind = f"{row['task']}, synthetic labels" if row["synthetic"] else row["task"]
    return (
        f"{name} ({kind}): {row['train']} train, {row['dev']} dev, {row['test']} test examples, {row['documents']} "
        f"documents; near duplicates across the split: {row['near_duplicates_dropped']} dropped, "
        f"{row['near_duplicates_left']} left; {row['documents_shared']} documents shared by train and "
        f"held-out examples; {row['rejected']} rows rejected"
    )
