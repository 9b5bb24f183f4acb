"""Rows of (query, positives, negatives) as people store them: reading, checking, and splits of a whole set.

Three shapes are understood, by column names: sentence-transformers (`anchor` or `query`, `positive`, `negative`,
`negative_1`...), FlagEmbedding (`query`, `pos` and `neg` lists, optional `pos_scores`, `neg_scores`) and Tevatron
(`query`, `positive_passages` and `negative_passages`: lists of `title`, `text`). Texts are taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nvembed.data.documents import Documents, DocumentWriter
from nvembed.data.sources.base import RejectLog, SourceRows, empty_splits, is_unicode, split_by_hash, too_long
from nvembed.data.tables import SPLITS, Document
from nvembed.text.identity import MAX_TEXT_BYTES, folded_hash, stable_hash
from nvembed.types import ScoredId, TaskType, TrainingExample, UserError

QUERY_COLUMNS = ("anchor", "query")
POSITIVE_COLUMNS = ("positive", "pos", "positive_passages")
_NEGATIVE = re.compile(r"negative(_\d+)?$")
SPLIT_RULE = (
    "by hash of the query and of its positives: rows that share a query or a positive text form one group, and a "
    "group is in one split ({share:.0%} test, {share:.0%} dev)"
)


Row = TypeVar("Row")


class MalformedRowError(Exception):
    """Why one row cannot be used; the reason never quotes the row's text."""


class RowDocument(NamedTuple):
    """One document of a row, and its score where the source gave one."""

    text: str
    score: float | None = None
    title: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Key of equal documents."""
        return self.title, self.text


@dataclass(frozen=True)
class PairRow:
    """One good row."""

    query: str
    positives: tuple[RowDocument, ...]
    negatives: tuple[RowDocument, ...]


@dataclass(frozen=True)
class RawRow:
    """One row as read: its place and its columns, or the reason why it could not be read."""

    file: str
    line: int
    columns: Mapping[str, Any] | None
    problem: str = ""


def check_columns(names: Iterable[str], place: str) -> None:
    """Refuse a file whose columns are of no known shape.

    Raises:
        UserError: naming the columns there are.
    """
    given = list(names)
    has_query = any(name in given for name in QUERY_COLUMNS)
    if not has_query or not any(name in given for name in POSITIVE_COLUMNS):
        raise UserError(
            f"{place} has the columns {', '.join(given) or '(none)'}. Needed: `anchor` or `query`, and `positive` "
            "(with `negative`, `negative_1`...: sentence-transformers), `pos` (with `neg`: FlagEmbedding) or "
            "`positive_passages` (Tevatron). Where they have other names, map them with `columns`."
        )


def parse_row(columns: Mapping[str, Any]) -> PairRow:
    """Check one row of any shape.

    Raises:
        MalformedRowError: query or positive missing, empty, not text, or not readable as UTF-8; no positive but the
            query's own text.
    """
    name = next((name for name in QUERY_COLUMNS if columns.get(name) is not None), None)
    if name is None:
        raise MalformedRowError("query missing")
    query = check_text(columns[name], "query")
    if columns.get("pos") is not None:
        positives = _scored(columns["pos"], columns.get("pos_scores"), "positive")
        negatives = _scored(columns.get("neg") or [], columns.get("neg_scores"), "negative")
    elif columns.get("positive_passages") is not None:
        positives = _tevatron(columns["positive_passages"], "positive")
        negatives = _tevatron(columns.get("negative_passages") or [], "negative")
    elif columns.get("positive") is not None:
        positives = (RowDocument(check_text(columns["positive"], "positive")),)
        keys = sorted((key for key in columns if _NEGATIVE.match(key)), key=lambda key: (len(key), key))
        given = [columns[key] for key in keys if columns[key] not in (None, "")]
        negatives = tuple(RowDocument(check_text(value, "negative")) for value in given)
    else:
        raise MalformedRowError("positive missing")
    if not positives:
        raise MalformedRowError("positive missing")
    same = folded_hash(query)  # the query's own text teaches nothing as its positive, and the wrong as its negative
    positives, negatives = (
        tuple(item for item in items if item.title or folded_hash(item.text) != same)
        for items in (positives, negatives)
    )
    if not positives:
        raise MalformedRowError("the positive is the query's own text")
    own = {item.key for item in positives}
    return PairRow(query, positives, tuple(item for item in negatives if item.key not in own))


def good_rows(raw_rows: Iterable[RawRow], parse: Callable[[Mapping[str, Any]], Row], log: RejectLog) -> Iterator[Row]:
    """Parse every row; bad ones are counted and logged by place."""
    for raw in raw_rows:
        log.rows += 1
        if raw.columns is None:
            log.add(raw.file, raw.line, raw.problem)
            continue
        try:
            yield parse(raw.columns)
        except MalformedRowError as error:
            log.add(raw.file, raw.line, str(error))


def pairs_to_rows(raw_rows: Iterable[RawRow], dataset: str, test_share: float, licence: str) -> SourceRows:
    """Documents by text, examples by query, splits by connected groups of rows.

    Rows with one query become one example with all its positives; document ids are hashes of their texts. Memory is
    the queries and the ids of their documents.
    """
    rejects, documents = RejectLog(), DocumentWriter()
    merged: dict[str, tuple[dict[str, float | None], dict[str, float | None]]] = {}
    for row in good_rows(raw_rows, parse_row, rejects):
        for known, items in zip(merged.setdefault(row.query, ({}, {})), (row.positives, row.negatives), strict=True):
            for item in items:
                key = document_id(item.title, item.text)
                if key not in known:
                    known[key] = item.score
                    documents.add(Document(key, item.title, item.text))
    splits = linked_splits({query: tuple(positives) for query, (positives, _) in merged.items()}, test_share)
    examples = empty_splits()
    for query, (positives, negatives) in merged.items():
        examples[splits[query]].append(
            TrainingExample(
                id=f"q-{stable_hash(query):016x}",
                dataset=dataset,
                task=TaskType.RETRIEVAL,
                query=query,
                positives=tuple(ScoredId(key, score) for key, score in positives.items()),
                negatives=tuple(ScoredId(key, score) for key, score in negatives.items() if key not in positives),
            )
        )
    return SourceRows(
        task=TaskType.RETRIEVAL,
        split_rule=SPLIT_RULE.format(share=test_share),
        licence=licence,
        documents=_once(documents.close(), dataset),
        examples=examples,
        documents_split=True,
        rejects=rejects,
    )


def _once(documents: Documents, dataset: str) -> Documents:
    """In the order of their ids; many rows have the same documents.

    Raises:
        UserError: two texts have one id; at a billion documents the odds of 64 bits are 3 %.
    """
    documents = documents.taken(documents.id_order())
    repeated = documents.repeated()
    again = np.flatnonzero(repeated)  # each follows one with its id
    other = (documents.taken(again).digests() != documents.taken(again - 1).digests()).any(axis=1)
    if other.any():
        key = next(documents.ids(again[other][:1]))
        raise UserError(f"data set {dataset}: two documents have the id {key}, a hash of their text. Leave one out.")
    return documents.taken(~repeated)


def require_every_split(rows: SourceRows, dataset: str, advice: str) -> None:
    """Refuse a data set with an empty split; one without a good row fails for its rejects.

    Raises:
        UserError: with the counts and `advice`.
    """
    counts = {split: len(rows.examples[split]) for split in SPLITS}
    if rows.rejects.total < rows.rejects.rows and not all(counts.values()):
        listed = ", ".join(f"{split} {count}" for split, count in counts.items())
        if rows.rejects.total:
            log = rows.rejects
            advice = f"{log.total} of {log.rows} rows are malformed ({log.reasons()}): mend them first. {advice}"
        raise UserError(f"data set {dataset}: a split is empty ({listed} examples). {advice}")


def document_id(title: str, text: str) -> str:
    """Id of a document by its content."""
    return f"d-{stable_hash(title, text) if title else stable_hash(text):016x}"


def linked_splits(linked: Mapping[str, Sequence[str]], test_share: float) -> dict[str, str]:
    """Split of each key: groups linked by what keys share (union-find), each by the hash of its smallest member."""
    parent: dict[str, str] = {}

    def find(text: str) -> str:
        parent.setdefault(text, text)
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for key, others in linked.items():
        for other in others:
            low, high = sorted((find(key), find(other)))
            parent[high] = low
    return {key: split_by_hash(find(key), salt="files", test_share=test_share, dev_share=test_share) for key in linked}


def check_text(value: Any, role: str) -> str:
    """The value, where it is a text that is not empty.

    Raises:
        MalformedRowError: it is not.
    """
    if not isinstance(value, str):
        raise MalformedRowError(f"{role} is not text")
    if not is_unicode(value):
        raise MalformedRowError(f"{role} is not UTF-8")
    if too_long(value):
        raise MalformedRowError(f"{role} is longer than {MAX_TEXT_BYTES:,} bytes")
    if not value.strip():
        raise MalformedRowError(f"{role} empty")
    return value


def _scored(values: Any, scores: Any, role: str) -> tuple[RowDocument, ...]:
    if not isinstance(values, list):
        raise MalformedRowError(f"{role}s are not a list")
    texts = [check_text(value, role) for value in values]
    if scores is None:
        return tuple(RowDocument(text) for text in texts)
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise MalformedRowError(f"{role} scores do not match the {role}s")
    if not all(isinstance(score, int | float) and not isinstance(score, bool) and isfinite(score) for score in scores):
        raise MalformedRowError(f"{role} score is not a number")
    return tuple(RowDocument(text, float(score)) for text, score in zip(texts, scores, strict=True))


def _tevatron(values: Any, role: str) -> tuple[RowDocument, ...]:
    """Tevatron's lists; their docids are dropped, as nothing says that they name one text only."""
    if not isinstance(values, list):
        raise MalformedRowError(f"{role}_passages is not a list")
    documents = []
    for value in values:
        if not isinstance(value, Mapping):
            raise MalformedRowError(f"{role}_passages holds an entry that is not an object")
        title = value.get("title") or ""
        if not isinstance(title, str) or not is_unicode(title):
            raise MalformedRowError(f"{role} title is not text")
        if too_long(title):
            raise MalformedRowError(f"{role} title is longer than {MAX_TEXT_BYTES:,} bytes")
        documents.append(RowDocument(check_text(value.get("text"), role), title=title))
    return tuple(documents)


def rows_of_records(records: Iterable[Mapping[str, Any]], place: str) -> Iterator[RawRow]:
    """Records that are already columns (parquet, hub), numbered from 1."""
    for number, record in enumerate(records, start=1):
        yield RawRow(place, number, record)


def renamed_columns(raw_rows: Iterable[RawRow], columns: Mapping[str, str]) -> Iterator[RawRow]:
    """Rows with the source's own columns under our names; `columns` is ours -> theirs."""
    ours = {theirs: name for name, theirs in columns.items()}
    for raw in raw_rows:
        if raw.columns is None or not ours:
            yield raw
            continue
        renamed = {key: value for key, value in raw.columns.items() if key not in columns}
        yield replace(raw, columns=renamed | {name: raw.columns.get(key) for key, name in ours.items()})
