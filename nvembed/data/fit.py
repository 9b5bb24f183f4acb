"""Making texts unique and fitting a data set under its caps; pure functions of rows and seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from nvembed.data.documents import SPLIT_CODES, Documents, split_codes
from nvembed.data.sources.base import SourceRows
from nvembed.data.tables import HELD_OUT, SPLITS
from nvembed.text.identity import stable_hash
from nvembed.types import ScoredId, TaskType, TrainingExample

_RANK = np.zeros(len(SPLIT_CODES), np.int8)  # which of equal texts stays: one that is held out, by the document's split
_RANK[split_codes(SPLITS[::-1])] = range(len(SPLITS))


def unique_texts(rows: SourceRows) -> None:
    """Make texts unique, in place: equal documents become one, and so do equal queries of one split.

    A query of several splits stays in the most held-out one only (test, then dev). For classes,
    where the text is the item, equal texts with different labels keep the first by id.
    """
    documents = rows.documents.taken(rows.documents.id_order())
    order = np.argsort(_RANK[documents.split_N], kind="stable")
    standing = np.empty(len(documents), np.int64)
    standing[order] = order[_first_of_equal(documents.digests()[order])]
    renamed = renamed_ids(documents, standing)
    rows.documents = documents.taken(standing == np.arange(len(documents)))
    taken: set[object] = set()
    for split in reversed(SPLITS):
        merged: dict[object, TrainingExample] = {}
        for example in sorted(rows.examples[split], key=lambda row: row.id):
            if rows.task.labelled and example.id in renamed:
                continue
            moved = _renamed(example, renamed)
            key = _key(moved)
            if key in taken or not (moved.positives or rows.task.labelled):
                continue
            merged[key] = _merge(merged[key], moved) if key in merged else moved
        taken |= merged.keys()
        rows.examples[split] = list(merged.values())


def merge_documents(rows: SourceRows, renamed: Mapping[str, str]) -> None:
    """Leave out duplicate documents, in place; examples then name the one that stays.

    Args:
        renamed: duplicate -> the document that replaces it.
    """
    rows.documents = rows.documents.taken(~rows.documents.mask(renamed))
    for split in SPLITS:
        rows.examples[split] = [_renamed(example, renamed) for example in rows.examples[split]]


def renamed_ids(documents: Documents, standing: np.ndarray) -> dict[str, str]:
    """Duplicate -> the document that replaces it.

    Args:
        standing: int64 [N], for each document the place of the one that stays; its own where it stays itself.
    """
    gone = np.flatnonzero(standing != np.arange(len(standing)))
    return dict(zip(documents.ids(gone), documents.ids(standing[gone]), strict=True))


def _first_of_equal(digest_N2: np.ndarray) -> np.ndarray:
    """int64 [N]: the first place with the same digest."""
    order = np.lexsort((digest_N2[:, 1], digest_N2[:, 0]))  # stable
    new = np.ones(len(order), bool)
    new[1:] = (digest_N2[order][1:] != digest_N2[order][:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first


def _key(example: TrainingExample) -> object:
    """Key of equal examples: the query, for graded pairs with its partner."""
    return (example.query, example.positives[0].id) if example.task is TaskType.STS else example.query


def _renamed(example: TrainingExample, renamed: Mapping[str, str]) -> TrainingExample:
    positives = {renamed.get(item.id, item.id): item.score for item in reversed(example.positives)}
    negatives = {renamed.get(item.id, item.id): item.score for item in reversed(example.negatives)}
    return replace(
        example,
        positives=tuple(ScoredId(key, positives[key]) for key in reversed(positives)),
        negatives=tuple(ScoredId(key, negatives[key]) for key in reversed(negatives) if key not in positives),
    )


def _merge(a: TrainingExample, b: TrainingExample) -> TrainingExample:
    if a.task is not TaskType.RETRIEVAL:
        return a
    positives = a.positives + tuple(item for item in b.positives if item.id not in {old.id for old in a.positives})
    own = {item.id for item in positives}
    known = {item.id for item in a.negatives}
    negatives = a.negatives + tuple(item for item in b.negatives if item.id not in known)
    return replace(a, positives=positives, negatives=tuple(item for item in negatives if item.id not in own))


def cap_examples(examples: list[TrainingExample], cap: int | None, seed: int) -> list[TrainingExample]:
    """Examples in the order of a seeded hash, the first `cap` of them.

    Both directions of a graded pair follow each other. Classes take turns, so that a cap keeps them all, evenly.
    """
    turns: dict[str | None, int] = defaultdict(int)
    ordered = []
    for example in sorted(examples, key=lambda row: (stable_hash(seed, _group(row)), row.id)):
        ordered.append((turns[example.label] if example.label is not None else 0, example))
        turns[example.label] += 1
    return [example for _, example in sorted(ordered, key=lambda pair: pair[0])][:cap]


def _group(example: TrainingExample) -> str:
    if example.task is TaskType.STS:
        return "~".join(sorted((example.id.split("~")[0], example.positives[0].id)))
    return example.id


def fit_corpus(rows: SourceRows, cap: int | None, seed: int) -> None:
    """Reduce the corpus to at most `cap` documents, in place.

    Held-out documents always stay. The rest of the cap is filled with the documents of train examples, in the order of
    the examples, then with their given negatives, then (retrieval) with others by seeded hash. Train examples whose
    document does not fit are dropped.

    Negatives that left the corpus leave the examples. Items of classification and sts corpora that belong to no
    example leave too.
    """
    retained = {key for split in HELD_OUT for example in rows.examples[split] for key in _documents_of(example)}
    limit = len(rows.documents) if cap is None else cap
    train = []
    for example in rows.examples["train"]:
        new = _documents_of(example) - retained
        if len(retained) + len(new) <= limit:
            retained |= new
            train.append(example)
    rows.examples["train"] = train
    if rows.task is TaskType.RETRIEVAL:
        given = dict.fromkeys(item.id for example in train for item in example.negatives if item.id not in retained)
        retained.update(list(given)[: max(0, limit - len(retained))])
    retained_N = rows.documents.mask(retained)
    if rows.task is TaskType.RETRIEVAL:
        rest = np.flatnonzero(~retained_N)
        if (room := max(0, limit - len(retained))) < len(rest):
            hashes = np.fromiter((stable_hash(seed, key) for key in rows.documents.ids(rest)), np.uint64, len(rest))
            rest = rest[np.argsort(hashes, kind="stable")[:room]]
        retained_N[rest] = True
    rows.documents = rows.documents.taken(retained_N)
    _drop_absent_negatives(rows)


def _drop_absent_negatives(rows: SourceRows) -> None:
    named = {item.id for split in SPLITS for example in rows.examples[split] for item in example.negatives}
    absent = named - rows.documents.places(named).keys()
    for split in SPLITS if absent else ():
        rows.examples[split] = [
            replace(example, negatives=tuple(item for item in example.negatives if item.id not in absent))
            for example in rows.examples[split]
        ]


def _documents_of(example: TrainingExample) -> set[str]:
    """Corpus rows an example cannot do without."""
    own = set() if example.task is TaskType.RETRIEVAL else {example.id.split("~")[0]}
    return own | {item.id for item in example.positives}
