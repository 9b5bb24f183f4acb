"""Rows of (query, positives, negatives) as people store them: reading, checking, and sides for a whole set of them.

Two shapes are understood, by column names: sentence-transformers (`anchor` or `query`, `positive`, `negative`,
`negative_1`...) and FlagEmbedding (`query`, `pos` and `neg` lists, optional `pos_scores`, `neg_scores`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nvembed.data.sources.base import RejectLog, SourceRows, empty_splits, is_unicode, split_by_hash, stable_hash
from nvembed.data.tables import SPLITS, Document
from nvembed.storage import UserError
from nvembed.types import ScoredId, TaskType, TrainingExample

QUERY_COLUMNS = ("anchor", "query")
_NEGATIVE = re.compile(r"negative(_\d+)?$")
SPLIT_RULE = (
    "by hash of the query and of its positives: rows that share a query or a positive text form one group, and a "
    "group stands on one side ({share:.0%} test, {share:.0%} dev)"
)


class MalformedRowError(Exception):
    """Why one row cannot be used; the reason never quotes the row's text."""


@dataclass(frozen=True)
class PairRow:
    """One good row: texts, and scores where the source gave them."""

    query: str
    positives: tuple[tuple[str, float | None], ...]
    negatives: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True)
class RawRow:
    """One row as read: its place and its columns, or the reason why it could not be read."""

    file: str
    line: int
    columns: Mapping[str, Any] | None
    problem: str = ""


@dataclass
class PairTable:
    """Good rows and the log of the others."""

    rows: list[PairRow] = field(default_factory=list)
    rejects: RejectLog = field(default_factory=RejectLog)


def check_columns(names: Iterable[str], place: str) -> None:
    """Refuse a file whose columns are of neither shape.

    Raises:
        UserError: naming the columns there are.
    """
    found = list(names)
    has_query = any(name in found for name in QUERY_COLUMNS)
    if not has_query or not ("positive" in found or "pos" in found):
        raise UserError(
            f"{place} has the columns {', '.join(found) or '(none)'}. Needed: `anchor` or `query`, and `positive` "
            "(with `negative`, `negative_1`...: sentence-transformers) or `pos` (with `neg`: FlagEmbedding)."
        )


def parse_row(columns: Mapping[str, Any]) -> PairRow:
    """Check one row of either shape.

    Raises:
        MalformedRowError: query or positive missing, empty, not text, or not readable as UTF-8.
    """
    name = next((name for name in QUERY_COLUMNS if columns.get(name) is not None), None)
    if name is None:
        raise MalformedRowError("query missing")
    query = _text(columns[name], "query")
    if columns.get("pos") is not None:
        positives = _scored(columns["pos"], columns.get("pos_scores"), "positive")
        negatives = _scored(columns.get("neg") or [], columns.get("neg_scores"), "negative")
    elif columns.get("positive") is not None:
        positives = ((_text(columns["positive"], "positive"), None),)
        keys = sorted((key for key in columns if _NEGATIVE.match(key)), key=lambda key: (len(key), key))
        given = [columns[key] for key in keys if columns[key] not in (None, "")]
        negatives = tuple((_text(value, "negative"), None) for value in given)
    else:
        raise MalformedRowError("positive missing")
    if not positives:
        raise MalformedRowError("positive missing")
    own = {text for text, _ in positives}
    return PairRow(query, positives, tuple(item for item in negatives if item[0] not in own))


def read_pairs(raw_rows: Iterable[RawRow]) -> PairTable:
    """Check every row; bad ones are counted and logged by place."""
    table = PairTable()
    for raw in raw_rows:
        table.rejects.rows += 1
        if raw.columns is None:
            table.rejects.add(raw.file, raw.line, raw.problem)
            continue
        try:
            table.rows.append(parse_row(raw.columns))
        except MalformedRowError as error:
            table.rejects.add(raw.file, raw.line, str(error))
    return table


def pairs_to_rows(table: PairTable, dataset: str, test_share: float, licence: str) -> SourceRows:
    """Documents by text, examples by query, sides by connected groups of rows.

    Rows with one query become one example with all its positives; document ids are hashes of their texts.
    """
    merged: dict[str, tuple[dict[str, float | None], dict[str, float | None]]] = {}
    for row in table.rows:
        positives, negatives = merged.setdefault(row.query, ({}, {}))
        positives.update((text, score) for text, score in row.positives if text not in positives)
        negatives.update((text, score) for text, score in row.negatives if text not in negatives)
    sides = _sides({query: tuple(positives) for query, (positives, _) in merged.items()}, test_share)
    texts = sorted({text for groups in merged.values() for group in groups for text in group})
    examples = empty_splits()
    for query, (positives, negatives) in merged.items():
        examples[sides[query]].append(
            TrainingExample(
                id=f"q-{stable_hash(query):016x}",
                dataset=dataset,
                task=TaskType.RETRIEVAL,
                query=query,
                positives=tuple(ScoredId(_document_id(text), score) for text, score in positives.items()),
                negatives=tuple(
                    ScoredId(_document_id(text), score) for text, score in negatives.items() if text not in positives
                ),
            )
        )
    return SourceRows(
        task=TaskType.RETRIEVAL,
        split_rule=SPLIT_RULE.format(share=test_share),
        licence=licence,
        documents=[Document(_document_id(text), "", text) for text in texts],
        examples=examples,
        documents_split=True,
        rejects=table.rejects,
    )


def require_every_split(rows: SourceRows, dataset: str, advice: str) -> None:
    """Refuse a data set with an empty side.

    Raises:
        UserError: with the counts and `advice`.
    """
    counts = {split: len(rows.examples[split]) for split in SPLITS}
    if not all(counts.values()):
        listed = ", ".join(f"{split} {count}" for split, count in counts.items())
        raise UserError(f"data set {dataset}: a side is empty ({listed} examples). {advice}")


def _document_id(text: str) -> str:
    return f"d-{stable_hash(text):016x}"


def _sides(positives_of: Mapping[str, tuple[str, ...]], test_share: float) -> dict[str, str]:
    """Side of each query: groups linked by shared texts (union-find), each by the hash of its smallest text."""
    parent: dict[str, str] = {}

    def find(text: str) -> str:
        parent.setdefault(text, text)
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for query, positives in positives_of.items():
        for text in positives:
            low, high = sorted((find(query), find(text)))
            parent[high] = low
    return {
        query: split_by_hash(find(query), salt="files", test_share=test_share, dev_share=test_share)
        for query in positives_of
    }


def _text(value: Any, role: str) -> str:
    if not isinstance(value, str):
        raise MalformedRowError(f"{role} is not text")
    if not is_unicode(value):
        raise MalformedRowError(f"{role} is not UTF-8")
    if not value.strip():
        raise MalformedRowError(f"{role} empty")
    return value


def _scored(values: Any, scores: Any, role: str) -> tuple[tuple[str, float | None], ...]:
    if not isinstance(values, list):
        raise MalformedRowError(f"{role}s are not a list")
    texts = [_text(value, role) for value in values]
    if scores is None:
        return tuple((text, None) for text in texts)
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise MalformedRowError(f"{role} scores do not match the {role}s")
    if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
        raise MalformedRowError(f"{role} score is not a number")
    return tuple((text, float(score)) for text, score in zip(texts, scores, strict=True))


def rows_of_records(records: Iterable[Mapping[str, Any]], place: str) -> Iterator[RawRow]:
    """Records that are already columns (parquet, hub), numbered from 1."""
    for number, record in enumerate(records, start=1):
        yield RawRow(place, number, record)
