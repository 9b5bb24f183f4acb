"""Texts that occur in two splits: near duplicates across the splits, duplicates inside a set, leaks of evaluation sets.

A near duplicate is a pair of texts whose word shingles have a Jaccard similarity at or above the threshold (`near.py`).
LSH only proposes pairs: it reports none that are not real, but can miss some. `count_left` looks again with other
permutations and counts what was missed.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from nvembed.core import storage
from nvembed.data.config import DecontaminateConfig, DeduplicateConfig, NearDuplicateConfig
from nvembed.data.dedup.contained import contained_pairs
from nvembed.data.dedup.near import NearPairs, Text, near_pairs, write_texts
from nvembed.data.fit import merge_documents, renamed_ids
from nvembed.data.sources.base import SourceRows
from nvembed.data.tables import HELD_OUT
from nvembed.types import TaskType, TrainingExample, UserError

TRAIN, DEV, TEST, EVALUATION = 0, 1, 2, 3
_ASCENDING = ((TRAIN, DEV), (TRAIN, TEST), (DEV, TEST))
_CODES = {"train": TRAIN, "dev": DEV, "test": TEST}


@contextmanager
def _working_folder(uri: str | None) -> Iterator[str]:
    """A working folder below the step's, which Ray's workers reach too; without a step, on this machine."""
    if uri is None:
        with tempfile.TemporaryDirectory() as folder:
            yield folder
        return
    place = storage.join(uri, ".tmp", "near")
    try:
        yield place
    finally:
        storage.remove(place)


@dataclass
class _Owned:
    """Texts and the example each belongs to, numbered as they are compared."""

    owners: list[tuple[str, str, int]] = field(default_factory=list)  # data set, split, place

    def texts(self, datasets: Mapping[str, SourceRows], splits: tuple[str, ...]) -> Iterator[Text]:
        """Texts that must not be in two splits of the same data sets."""
        return self._texts(datasets, splits, None)

    def leaking(self, datasets: Mapping[str, SourceRows], splits: tuple[str, ...], code: int) -> Iterator[Text]:
        """Queries and positives, also where all splits share the documents."""
        return self._texts(datasets, splits, code)

    def _texts(self, datasets: Mapping[str, SourceRows], splits: tuple[str, ...], code: int | None) -> Iterator[Text]:
        for split in splits:
            for name, rows in datasets.items():
                for place, group in enumerate(_texts_by_example(rows, split, shared=code is not None)):
                    for number, text in enumerate(group):
                        self.owners.append((name, split, place))
                        yield _CODES[split] if code is None else code, number == 0, text


def drop_near_duplicates(
    datasets: dict[str, SourceRows],
    config: NearDuplicateConfig,
    work_uri: str | None = None,
    contained_words: int | None = None,
) -> dict[str, int]:
    """Drop, in place, dev examples that nearly copy test ones and train examples that nearly copy any held-out one.

    Compared are queries and, where a data set keeps its documents apart too, positives; across all data sets at once.
    Where documents stand apart, given negatives of train examples that are held-out positives go too.

    Args:
        contained_words: a query of at least so many words that occurs whole in a text of the other split counts too.

    Returns:
        Examples dropped, by data set.
    """
    owned = _Owned()
    with _working_folder(work_uri) as uri:
        shards = write_texts(owned.texts(datasets, ("test", "dev", "train")), uri)
        near = near_pairs(shards, config, split_pairs=_ASCENDING)
        contained = np.zeros((0, 2), np.int64)
        if contained_words is not None:
            contained = contained_pairs(
                shards, contained_words, split_pairs=(*_ASCENDING, *((b, a) for a, b in _ASCENDING))
            )
    split_N = shards.split
    contained = np.where((split_N[contained[:, 0]] < split_N[contained[:, 1]])[:, None], contained, contained[:, ::-1])
    copied = _copied(near, contained, split_N, lambda lower, higher: (lower == DEV) & (higher == TEST))
    gone = {owned.owners[number] for number in np.flatnonzero(copied)}
    # what a dev example copied only matters to training while the example stays
    stays = np.array([owner not in gone for owner in owned.owners], bool)
    copied = _copied(near, contained, split_N, lambda lower, higher: lower == TRAIN, stays)
    gone |= {owned.owners[number] for number in np.flatnonzero(copied)}
    dropped = Counter(name for name, _, _ in gone)
    for name, rows in datasets.items():
        for split in ("dev", "train"):
            numbered = enumerate(rows.examples[split])
            rows.examples[split] = [row for place, row in numbered if (name, split, place) not in gone]
        if rows.documents_split:
            _drop_held_out_negatives(rows)
    return {name: dropped[name] for name in datasets}


def _copied(
    duplicates: NearPairs,
    contained: np.ndarray,
    split_N: np.ndarray,
    chosen: Callable[[np.ndarray, np.ndarray], np.ndarray],
    stays_N: np.ndarray | None = None,
) -> np.ndarray:
    """bool [N]: texts that copy one of a higher split, of the pairs of splits that are chosen.

    Args:
        contained: int64 [K, 2], further pairs, of any texts.
        stays_N: whether a text still counts as one to be copied.
    """
    stays_N = np.ones(len(split_N), bool) if stays_N is None else stays_N
    alive, near = np.zeros(len(split_N), bool), np.zeros(len(split_N), bool)
    alive[duplicates.first_same[stays_N]] = True
    pairs = duplicates.pairs[chosen(split_N[duplicates.pairs[:, 0]], split_N[duplicates.pairs[:, 1]])]
    near[pairs[alive[pairs[:, 1]], 0]] = True
    flags = near[duplicates.first_same]
    pairs = contained[chosen(split_N[contained[:, 0]], split_N[contained[:, 1]])]
    flags[pairs[stays_N[pairs[:, 1]], 0]] = True
    return flags


def count_left(
    datasets: dict[str, SourceRows], config: NearDuplicateConfig, work_uri: str | None = None
) -> dict[str, int]:
    """Train examples that still have a near duplicate among the held-out texts, by data set.

    LSH misses some pairs; this count uses other permutations, which miss others. Documents that all splits share
    cannot be separated and are not compared.
    """
    owned = _Owned()
    with _working_folder(work_uri) as uri:
        shards = write_texts(owned.texts(datasets, ("test", "dev", "train")), uri)
        near = near_pairs(shards, config, split_pairs=((TRAIN, DEV), (TRAIN, TEST)), seed=2)
    copied = _copied(near, np.zeros((0, 2), np.int64), shards.split, lambda lower, higher: lower == TRAIN)
    left = Counter(name for name, _, _ in {owned.owners[number] for number in np.flatnonzero(copied)})
    return {name: left[name] for name in datasets}


def shared_documents(rows: SourceRows) -> int:
    """Documents that are positives of a train and of a held-out example: unavoidable where the corpus is shared."""
    train = {item.id for example in rows.examples["train"] for item in example.positives}
    held_out = {item.id for split in HELD_OUT for example in rows.examples[split] for item in example.positives}
    return len(train & held_out)


# -- duplicates inside a set ------------------------------------------------------------------------------------------


def deduplicate(rows: SourceRows, config: DeduplicateConfig, work_uri: str | None = None) -> dict[str, int]:
    """Drop near duplicates inside one data set, in place.

    Retrieval documents: the first by id stays, and where another was an answer it is the answer. Training queries
    (graded pairs aside, where a text is part of many pairs): the first by id stays.

    Returns:
        Documents and training examples that left.
    """
    gone = {"documents": 0, "queries": 0}
    if config.documents and rows.task is TaskType.RETRIEVAL:
        ordered = rows.documents.taken(rows.documents.id_order())
        renamed = renamed_ids(ordered, _first_of_group(ordered.texts(), config, work_uri))
        gone["documents"] = len(renamed)
        merge_documents(rows, renamed)
    if config.queries and rows.task is not TaskType.STS:
        train = sorted(rows.examples["train"], key=lambda row: row.id)
        first = _first_of_group((row.query for row in train), config, work_uri).tolist()
        rows.examples["train"] = [row for place, row in enumerate(train) if first[place] == place]
        gone["queries"] = len(train) - len(rows.examples["train"])
    return gone


def _first_of_group(texts: Iterable[str], config: NearDuplicateConfig, work_uri: str | None) -> np.ndarray:
    """int64 [N]: for each text the place of the one that stays: itself, or the first that it nearly copies."""
    with _working_folder(work_uri) as uri:
        shards = write_texts(((TRAIN, False, text) for text in texts), uri)
        near = near_pairs(shards, config, split_pairs=((TRAIN, TRAIN),))
    first = near.first_same.copy()
    for a, b in near.pairs[np.lexsort((near.pairs[:, 0], near.pairs[:, 1]))].tolist():
        if first[a] == a and first[b] == b:
            first[b] = a
    return first[first]


# -- leaks of evaluation sets -----------------------------------------------------------------------------------------


@dataclass
class Leaks:
    """Training examples that contain or nearly copy texts of evaluation sets, by both sets.

    Attributes:
        near: by near duplicates of queries or positives.
        contained: by a query whole inside a text of the other split.
        examples: places in the training split, by training set, of both kinds.
    """

    near: Counter[tuple[str, str]] = field(default_factory=Counter)
    contained: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[str, set[int]] = field(default_factory=dict)

    def of(self, dataset: str) -> dict[str, dict[str, int]]:
        """The leaks of one training set, for the manifest."""
        names = sorted({other for name, other in (*self.near, *self.contained) if name == dataset})
        return {
            other: {"near_duplicates": self.near[dataset, other], "contained": self.contained[dataset, other]}
            for other in names
        }


def find_leaks(
    datasets: Mapping[str, SourceRows],
    evaluation: Mapping[str, SourceRows],
    near: NearDuplicateConfig,
    contained_words: int | None,
    work_uri: str | None = None,
) -> Leaks:
    """Compare training queries and positives with held-out queries and their positives of the evaluation sets."""
    owned = _Owned()
    with _working_folder(work_uri) as uri:
        given = itertools.chain(
            owned.leaking(evaluation, HELD_OUT, EVALUATION), owned.leaking(datasets, ("train",), TRAIN)
        )
        shards = write_texts(given, uri)
        copies = near_pairs(shards, near, split_pairs=((TRAIN, EVALUATION),))
        contained = np.zeros((0, 2), np.int64)
        if contained_words is not None:
            contained = contained_pairs(shards, contained_words, split_pairs=((TRAIN, EVALUATION), (EVALUATION, TRAIN)))
    leaks = Leaks()
    _count(leaks, leaks.near, _expanded(copies), owned)
    swapped = shards.split[contained[:, 0]] == EVALUATION
    contained[swapped] = contained[swapped][:, ::-1]
    _count(leaks, leaks.contained, contained, owned)
    return leaks


def _expanded(near: NearPairs) -> np.ndarray:
    """int64 [K, 2]: pairs of the first texts, with every train text and one evaluation text of each set's owner."""
    same: dict[int, list[int]] = {}
    wanted = set(near.pairs.ravel().tolist())
    for number, first in enumerate(near.first_same.tolist()):
        if first in wanted:
            same.setdefault(first, []).append(number)
    pairs = [(a, b) for first, second in near.pairs.tolist() for a in same[first] for b in same[second]]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _count(leaks: Leaks, counter: Counter[tuple[str, str]], pairs: np.ndarray, owned: _Owned) -> None:
    """Count each training example once for each evaluation set."""
    hit = {(owned.owners[train], owned.owners[other][0]) for train, other in pairs.tolist()}
    for (name, _, place), other in hit:
        counter[name, other] += 1
        leaks.examples.setdefault(name, set()).add(place)


def settle_leaks(datasets: dict[str, SourceRows], leaks: Leaks, config: DecontaminateConfig) -> dict[str, int]:
    """Drop leaking training examples, or fail, or let them pass, as the recipe says.

    Returns:
        Examples dropped, by data set.

    Raises:
        UserError: a leak that is neither dropped nor allowed.
    """
    if unknown := sorted(set(config.allow) - set(datasets)):
        raise UserError(f"prepare.decontaminate.allow names {', '.join(unknown)}; sources: {', '.join(datasets)}.")
    leaking = [name for name in datasets if leaks.examples.get(name) and name not in config.allow]
    if leaking and config.on_leak == "fail":
        listed = "; ".join(
            f"{name}: {row['near_duplicates']} near duplicates of {other}, {row['contained']} with a query contained"
            for name in leaking
            for other, row in leaks.of(name).items()
        )
        raise UserError(
            f"evaluation sets leak into the training examples ({listed}). Leave these examples out with "
            "prepare.decontaminate.on_leak: drop, or keep them with prepare.decontaminate.allow: "
            f"[{', '.join(leaking)}]."
        )
    dropped = dict.fromkeys(datasets, 0)
    for name in leaking:
        numbered = enumerate(datasets[name].examples["train"])
        rows = [row for place, row in numbered if place not in leaks.examples[name]]
        dropped[name] = len(datasets[name].examples["train"]) - len(rows)
        datasets[name].examples["train"] = rows
    return dropped


# -- both -------------------------------------------------------------------------------------------------------------


def _texts_by_example(rows: SourceRows, split: str, *, shared: bool) -> Iterator[list[str]]:
    """The texts of each example that must not be in two splits, the query first.

    Args:
        shared: positives too where all splits share the documents.
    """
    compared = (shared or rows.documents_split) and not rows.task.labelled  # of classes, the query is the document
    wanted = {item.id for example in rows.examples[split] for item in example.positives} if compared else set()
    texts = rows.documents.texts_of(wanted)
    for example in rows.examples[split]:
        yield [example.query, *(texts[item.id] for item in example.positives if compared)]


def _drop_held_out_negatives(rows: SourceRows) -> None:
    held_out = {item.id for split in HELD_OUT for example in rows.examples[split] for item in example.positives}

    def cleaned(example: TrainingExample) -> TrainingExample:
        negatives = tuple(item for item in example.negatives if item.id not in held_out)
        return example if len(negatives) == len(example.negatives) else replace(example, negatives=negatives)

    rows.examples["train"] = [cleaned(example) for example in rows.examples["train"]]
