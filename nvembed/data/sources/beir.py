"""A BEIR folder at any fsspec URI: `corpus.jsonl`, `queries.jsonl` (or compressed), `qrels/<split>.tsv` with grades."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from nvembed.core import storage
from nvembed.core.lines import bounded_lines
from nvembed.data.config import BeirSource
from nvembed.data.documents import Documents, DocumentWriter
from nvembed.data.sources.base import RejectLog, SourceRows, empty_splits, is_unicode, split_by_hash, too_long
from nvembed.data.sources.files import COMPRESSIONS, json_lines, open_bytes
from nvembed.data.tables import BEIR_CORPUS, BEIR_QUERIES, SPLITS, Document
from nvembed.text.identity import MAX_TEXT_BYTES
from nvembed.types import ScoredId, TaskType, TrainingExample, UserError

DEV_SHARE = 0.1  # of the training queries, where the folder has no dev.tsv
SPLIT_RULE = (
    "as the folder's qrels say{dev}; a query in several splits stays in the most held-out one; documents are shared"
)


def read_beir(config: BeirSource) -> SourceRows:
    """Read the folder; `train` may be absent (evaluation only), `test` may not.

    Raises:
        UserError: a file is missing, or no held-out query has a document.
    """
    rejects = RejectLog()
    documents = _unique(config.uri, BEIR_CORPUS, rejects)
    queries = {document.id: document.text for document in _unique(config.uri, BEIR_QUERIES, rejects)}
    qrels = _read_qrels(config, queries, documents, rejects)
    examples = empty_splits()
    taken: set[str] = set()
    for split in reversed(SPLITS):
        for key, judgements in qrels.get(split, {}).items():
            if key in taken or not any(score > 0 for score in judgements.values()):
                continue
            taken.add(key)
            target = split
            if split == "train" and "dev" not in qrels:
                target = split_by_hash(key, salt="beir", test_share=0.0, dev_share=DEV_SHARE)
            examples[target].append(_example(config.name, key, queries[key], judgements))
    if not examples["test"] and rejects.total < rejects.rows:
        raise UserError(f"{config.uri}: the test qrels give no query a document.")
    dev = "" if "dev" in qrels else f" ({DEV_SHARE:.0%} of the training queries, by hash, as dev)"
    return SourceRows(
        task=TaskType.RETRIEVAL,
        split_rule=SPLIT_RULE.format(dev=dev),
        licence=config.licence,
        documents=documents,
        examples=examples,
        documents_split=False,
        rejects=rejects,
    )


def _example(dataset: str, key: str, query: str, judgements: dict[str, float]) -> TrainingExample:
    """Judgements above 0 are positives, those of 0 and below given negatives."""
    return TrainingExample(
        id=key,
        dataset=dataset,
        task=TaskType.RETRIEVAL,
        query=query,
        positives=tuple(ScoredId(document, score) for document, score in judgements.items() if score > 0),
        negatives=tuple(ScoredId(document, score) for document, score in judgements.items() if score <= 0),
    )


def _read_qrels(
    config: BeirSource, queries: dict[str, str], documents: Documents, rejects: RejectLog
) -> dict[str, dict[str, dict[str, float]]]:
    """Judgements by split; those of a split's files are merged, a later file overrides an earlier one."""
    files = _qrels(config)
    known = set(documents.places(key for uris in files.values() for uri in uris for key in _named_documents(uri)))
    by_split: dict[str, dict[str, dict[str, float]]] = {}
    for split, uris in files.items():
        scores_of = by_split.setdefault(split, {})
        for uri in uris:
            for key, scores in _judgements(uri, queries, known, rejects).items():
                scores_of.setdefault(key, {}).update(scores)
    return by_split


def _qrels(config: BeirSource) -> dict[str, list[str]]:
    """URIs of the qrels files of each split."""
    wanted: dict[str, tuple[str, ...]] = (
        {split: (split,) for split in SPLITS} if config.qrels is None else {str(k): v for k, v in config.qrels.items()}
    )
    uris: dict[str, list[str]] = {}
    for split, names in wanted.items():
        for name in names:
            uri = storage.join(config.uri, "qrels", f"{name}.tsv")
            if not storage.exists(uri) and storage.exists(as_json := uri.removesuffix(".tsv") + ".jsonl"):
                uri = as_json
            if storage.exists(uri):
                uris.setdefault(split, []).append(uri)
            elif split == "test" or config.qrels is not None:
                raise UserError(f"{uri}: no such file; a BEIR folder needs qrels/test.tsv, or say which with `qrels`.")
    if "test" not in uris:
        raise UserError(f"{config.uri}: `qrels` names no file for test.")
    return uris


def _unique(folder: str, name: str, rejects: RejectLog) -> Documents:
    """A jsonl file's good rows; an id that comes twice is malformed the second time."""
    writer, lines = DocumentWriter(), array("q")
    for line, document in _texts(folder, name, rejects):
        writer.add(document)
        lines.append(line)
    documents = writer.close()
    twice = documents.repeated()
    for place in np.flatnonzero(twice).tolist():
        rejects.add(name, lines[place], "_id twice")
    return documents.taken(~twice) if twice.any() else documents


def _texts(folder: str, name: str, rejects: RejectLog) -> Iterator[tuple[int, Document]]:
    """The good rows of a jsonl file, and the line of each."""
    uris = [storage.join(folder, name + ending) for ending in ("", *COMPRESSIONS)]
    uri = next((uri for uri in uris if storage.exists(uri)), None)
    if uri is None:
        raise UserError(f"{uris[0]}: no such file; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/test.tsv.")
    with open_bytes(uri) as file:
        for row in json_lines(file, name):
            rejects.rows += 1
            columns: dict[str, Any] = dict(row.columns or {})
            key, title, text = columns.get("_id"), columns.get("title") or "", columns.get("text")
            problem = row.problem
            if not problem and (not isinstance(key, str) or not key):
                problem = "_id missing or not text"
            elif not problem and not (isinstance(text, str) and isinstance(title, str)):
                problem = "text missing or not text"
            elif not problem and not (is_unicode(str(title)) and is_unicode(str(text)) and is_unicode(str(key))):
                problem = "not UTF-8"
            elif not problem and not (str(title) + str(text)).strip():
                problem = "text empty"
            elif not problem and too_long(str(title) + str(text)):
                problem = f"longer than {MAX_TEXT_BYTES:,} bytes"
            if problem:
                rejects.add(name, row.line, problem)
                continue
            yield row.line, Document(str(key), str(title), str(text))


def _rows(uri: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """Line and fields of the rows of a qrels file."""
    with storage.open_reader(uri) as file:
        yield from _json_fields(file, name) if uri.endswith(".jsonl") else _fields(file, name)


def _named_documents(uri: str) -> set[str]:
    return {fields[1] for _, fields in _rows(uri, "") if len(fields) == 3}


def _judgements(
    uri: str, queries: dict[str, str], documents: set[str], rejects: RejectLog
) -> dict[str, dict[str, float]]:
    """Scores by query and document of a qrels file."""
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    name = "qrels/" + uri.rsplit("/", 1)[-1]
    for number, fields in _rows(uri, name):
        rejects.rows += 1
        if len(fields) != 3:
            rejects.add(name, number, "not three fields")
        elif fields[0] not in queries:
            rejects.add(name, number, "unknown query")
        elif fields[1] not in documents:
            rejects.add(name, number, "unknown document")
        elif (score := _number(fields[2])) is None:
            rejects.add(name, number, "score is not a number")
        else:
            scores[fields[0]][fields[1]] = score
    return dict(scores)


def _number(text: str) -> float | None:
    """A finite number; None where the text is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _fields(file: IO[bytes], name: str) -> Iterator[tuple[int, list[str]]]:
    """Lines of query, document, score (BEIR) or query, 0, document, score (TREC), the header left out."""
    for number, line in bounded_lines(file, name):
        if line is None:
            yield number, []
            continue
        fields = line.decode("utf-8", "replace").rstrip("\r\n").split("\t")
        if (number == 1 and fields[0] == "query-id") or not line.strip():
            continue
        yield number, [fields[0], *fields[2:]] if len(fields) == 4 and fields[1] in ("0", "Q0") else fields


def _json_fields(file: IO[bytes], name: str) -> Iterator[tuple[int, list[str]]]:
    """The same of jsonl rows, as folders on the hub have them."""
    for row in json_lines(file, name):
        columns = row.columns or {}
        yield row.line, [str(columns[key]) for key in ("query-id", "corpus-id", "score") if key in columns]
