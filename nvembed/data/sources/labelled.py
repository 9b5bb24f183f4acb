"""Rows with labels or grades: classes and clusters (`text`, `label`), graded pairs (`sentence1`, `sentence2`, `score`).

Classes and clusters have no positives of their own. Example-based (NV-Embed v2 4.3): mining draws another text of the
class, and negatives from other classes. Label-based (v1, and v2's binary sets): the label's text is the positive, those
of the other labels are the negatives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from nvembed.data.config import RowSource
from nvembed.data.documents import Documents
from nvembed.data.sources.base import RejectLog, SourceRows, empty_splits, split_by_hash
from nvembed.data.sources.rows import MalformedRowError, RawRow, check_text, good_rows, linked_splits
from nvembed.data.tables import Document
from nvembed.text.identity import stable_hash
from nvembed.types import ScoredId, TaskType, TrainingExample, UserError

LABELLED_RULE = "by hash of the text ({share:.0%} test, {share:.0%} dev); all classes are in all splits"
GRADED_RULE = (
    "by hash of both texts: pairs that share a text form one group, and a group is in one split ({share:.0%} test, "
    "{share:.0%} dev)"
)


class LabelledRow(NamedTuple):
    """A text and its class; `label_text` is the source's text for the label, if it has one."""

    text: str
    label: str
    label_text: str | None


class GradedRow(NamedTuple):
    """Two texts and how similar they are, in the source's own scale."""

    first: str
    second: str
    score: float


def check_labelled_columns(names: Iterable[str], place: str) -> None:
    """Refuse a file without `text` and `label`."""
    _check_columns(names, place, ("text", "label"))


def check_graded_columns(names: Iterable[str], place: str) -> None:
    """Refuse a file without `sentence1`, `sentence2` and `score`."""
    _check_columns(names, place, ("sentence1", "sentence2", "score"))


def _check_columns(names: Iterable[str], place: str, wanted: tuple[str, ...]) -> None:
    given = list(names)
    if not set(wanted) <= set(given):
        raise UserError(
            f"{place} has the columns {', '.join(given) or '(none)'}. Needed: {', '.join(wanted)}. Where they have "
            "other names, map them with `columns`."
        )


def parse_labelled(columns: Mapping[str, Any]) -> LabelledRow:
    """Check one row; a whole number is a label too.

    Raises:
        MalformedRowError: text or label missing, empty or of another kind.
    """
    if columns.get("text") is None:
        raise MalformedRowError("text missing")
    label = columns.get("label")
    if label is None:
        raise MalformedRowError("label missing")
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    given = columns.get("label_text")
    return LabelledRow(
        check_text(columns["text"], "text"),
        check_text(label, "label"),
        None if given is None else check_text(given, "label text"),
    )


def parse_graded(columns: Mapping[str, Any]) -> GradedRow:
    """Check one row; csv gives scores as text.

    Raises:
        MalformedRowError: a text is missing or empty, or the score is no number.
    """
    for name in ("sentence1", "sentence2", "score"):
        if columns.get(name) is None:
            raise MalformedRowError(f"{name} missing")
    score = columns["score"]
    try:
        number = math.nan if isinstance(score, bool) else float(score)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MalformedRowError("score is not a number")
    return GradedRow(
        check_text(columns["sentence1"], "sentence1"), check_text(columns["sentence2"], "sentence2"), number
    )


def labelled_to_rows(raw_rows: Iterable[RawRow], config: RowSource) -> SourceRows:
    """One document and example per text; with `positives_from: labels` also one document per label.

    A text under two labels is refused the second time, and so is a text that is a label's own.
    """
    rejects = RejectLog()
    labels: dict[str, str] = {}
    texts: dict[str, str] = {}
    for raw in raw_rows:
        for row in good_rows([raw], parse_labelled, rejects):
            if texts.setdefault(row.text, row.label) != row.label:
                rejects.add(raw.file, raw.line, "text has another label already")
            labels.setdefault(row.label, config.label_texts.get(row.label, row.label_text or row.label))
    by_label = config.positives_from == "labels"
    if by_label:
        _check_labels(config, labels)
        for text in sorted(set(texts) & set(labels.values())):
            del texts[text]
            rejects.add(config.name, 0, "text is that of a label")
    task = TaskType(config.task)
    ids = {label: f"label-{stable_hash(label):016x}" for label in sorted(labels)}
    documents, examples = [], empty_splits()
    for text in sorted(texts):
        label = texts[text]
        key = f"t-{stable_hash(text):016x}"
        split = split_by_hash(text, salt="files", test_share=config.test_share, dev_share=config.test_share)
        documents.append(Document(key, "", text, label=label, split=split))
        labelled = by_label and split == "train"
        examples[split].append(
            TrainingExample(
                id=key,
                dataset=config.name,
                task=task,
                query=text,
                positives=(ScoredId(ids[label]),) if labelled else (),
                negatives=tuple(ScoredId(ids[other]) for other in ids if other != label) if labelled else (),
                label=label,
            )
        )
    if by_label:
        documents += [Document(ids[label], "", labels[label], label=label) for label in sorted(labels)]
    return SourceRows(
        task=task,
        split_rule=LABELLED_RULE.format(share=config.test_share),
        licence=config.licence,
        documents=Documents.of(documents),
        examples=examples,
        documents_split=True,
        rejects=rejects,
        positives_from=config.positives_from,
    )


def _check_labels(config: RowSource, labels: Mapping[str, str]) -> None:
    if unknown := sorted(set(config.label_texts) - set(labels)):
        raise UserError(
            f"data set {config.name}: label_texts names {', '.join(unknown)}, which no row has; its labels are "
            f"{', '.join(sorted(labels)[:20])}."
        )
    if len(set(labels.values())) < len(labels):
        raise UserError(f"data set {config.name}: two labels have one text; give each its own with label_texts.")
    if len(labels) == 1:
        raise UserError(f"data set {config.name}: all rows have one label; a classifier needs two.")


def graded_to_rows(raw_rows: Iterable[RawRow], config: RowSource) -> SourceRows:
    """Pairs with scores from 0 to 1; train pairs in both directions. A pair comes once: later ones are refused."""
    rejects = RejectLog()
    low, high = config.score_range
    pairs: dict[tuple[str, str], tuple[str, str, float]] = {}
    for raw in raw_rows:
        for row in good_rows([raw], parse_graded, rejects):
            key = (min(row.first, row.second), max(row.first, row.second))
            if not low <= row.score <= high:
                rejects.add(raw.file, raw.line, f"score outside {low:g} to {high:g}")
            elif row.first == row.second:
                rejects.add(raw.file, raw.line, "both texts are the same")
            elif key in pairs:
                rejects.add(raw.file, raw.line, "pair twice")
            else:
                pairs[key] = (row.first, row.second, (row.score - low) / (high - low))
    linked: dict[str, list[str]] = {}
    for first, second in pairs:
        linked.setdefault(first, []).append(second)
    splits = linked_splits(linked, config.test_share)
    examples, used = empty_splits(), {}
    for (smaller, _), (first, second, score) in sorted(pairs.items()):
        split = splits[smaller]
        used[first] = used[second] = split
        for a, b in ((first, second), (second, first)) if split == "train" else ((first, second),):
            examples[split].append(_graded(config.name, a, b, score))
    return SourceRows(
        task=TaskType.STS,
        split_rule=GRADED_RULE.format(share=config.test_share),
        licence=config.licence,
        documents=Documents.of(Document(_text_id(text), "", text, split=split) for text, split in sorted(used.items())),
        examples=examples,
        documents_split=True,
        rejects=rejects,
    )


def _graded(dataset: str, a: str, b: str, score: float) -> TrainingExample:
    return TrainingExample(
        id=f"{_text_id(a)}~{_text_id(b)}",
        dataset=dataset,
        task=TaskType.STS,
        query=a,
        positives=(ScoredId(_text_id(b), score),),
    )


def _text_id(text: str) -> str:
    return f"t-{stable_hash(text):016x}"
