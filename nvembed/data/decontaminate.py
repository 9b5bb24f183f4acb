"""Near copies across the splits: found by MinHash-LSH over word shingles, confirmed by exact Jaccard similarity.

A near copy is a pair of texts whose shingle sets have Jaccard similarity at or above the threshold. LSH only proposes
pairs: it reports none that are not real, but can miss some (1 in 5,000 at 64 permutations and threshold 0.8, since the
net is cast at half the threshold). `count_left` looks again with other permutations and counts what was missed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import xxhash
from datasketch import MinHash, MinHashLSH

from nvembed.data.config import NearCopyConfig
from nvembed.data.sources.base import SourceRows
from nvembed.data.tables import HELD_OUT, document_text
from nvembed.types import TaskType, TrainingExample

_WORD = re.compile(r"\w+|[^\w\s]")


def shingles(text: str, words: int) -> frozenset[bytes]:
    """Runs of `words` consecutive words, case-folded; a shorter text is one shingle. Symbols count as words."""
    tokens = _WORD.findall(text.casefold())
    if len(tokens) <= words:
        return frozenset({" ".join(tokens).encode("utf-8")})
    return frozenset(
        " ".join(tokens[start : start + words]).encode("utf-8") for start in range(len(tokens) - words + 1)
    )


def jaccard(a: frozenset[bytes], b: frozenset[bytes]) -> float:
    """Shared share of two shingle sets."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


class NearCopyIndex:
    """Texts that others are compared with.

    Args:
        config: threshold, permutations, shingle size.
        seed: which permutations.
    """

    def __init__(self, config: NearCopyConfig, *, seed: int = 1) -> None:
        self._config, self._seed = config, seed
        self._lsh = MinHashLSH(threshold=config.threshold / 2, num_perm=config.num_perm)
        self._shingles: list[frozenset[bytes]] = []
        self._known: set[frozenset[bytes]] = set()

    def add(self, texts: Iterable[str]) -> None:
        """Add texts; equal ones count once."""
        for pieces, sketch in self._sketches(texts):
            if pieces not in self._known:
                self._known.add(pieces)
                self._lsh.insert(len(self._shingles), sketch)
                self._shingles.append(pieces)

    def near_copies(self, texts: Iterable[str]) -> list[bool]:
        """For each text, whether an indexed one is its near copy."""
        return [
            pieces in self._known
            or any(jaccard(pieces, self._shingles[i]) >= self._config.threshold for i in self._lsh.query(sketch))
            for pieces, sketch in self._sketches(texts)
        ]

    def near_copied_groups(self, groups: list[list[str]]) -> list[bool]:
        """For each group of texts, whether any of them is a near copy."""
        flags = self.near_copies(text for group in groups for text in group)
        ends = list(itertools.accumulate(len(group) for group in groups))
        return [any(flags[end - len(group) : end]) for end, group in zip(ends, groups, strict=True)]

    def _sketches(self, texts: Iterable[str]) -> Iterator[tuple[frozenset[bytes], MinHash]]:
        pieces = [shingles(text, self._config.shingle_words) for text in texts]
        sketches = MinHash.generator(
            pieces, num_perm=self._config.num_perm, seed=self._seed, hashfunc=xxhash.xxh32_intdigest
        )
        return zip(pieces, sketches, strict=True)


def drop_near_copies(datasets: dict[str, SourceRows], config: NearCopyConfig) -> dict[str, int]:
    """Drop, in place, dev examples that nearly copy test ones and train examples that nearly copy any held-out one.

    Compared are queries and, where a data set keeps its documents apart too, positives; across all data sets at once.
    Where documents stand apart, given negatives of train examples that are held-out positives go too.

    Returns:
        Examples dropped, by data set.
    """
    dropped = dict.fromkeys(datasets, 0)
    index = NearCopyIndex(config)
    for split in ("test", "dev", "train"):
        texts = {name: _texts_by_example(rows, split) for name, rows in datasets.items()}
        if split != "test":
            for name, rows in datasets.items():
                copied = index.near_copied_groups(texts[name])
                dropped[name] += sum(copied)
                kept = zip(rows.examples[split], texts[name], copied, strict=True)
                pairs = [(example, group) for example, group, copy in kept if not copy]
                rows.examples[split] = [example for example, _ in pairs]
                texts[name] = [group for _, group in pairs]
        if split != "train":
            for groups in texts.values():
                index.add(text for group in groups for text in group)
    for rows in datasets.values():
        if rows.documents_split:
            _drop_held_out_negatives(rows)
    return dropped


def count_left(datasets: dict[str, SourceRows], config: NearCopyConfig) -> dict[str, int]:
    """Train examples that still have a near copy among the held-out texts, by data set: LSH misses, found with
    other permutations. Documents shared by all splits, which cannot be kept apart, are not compared."""
    index = NearCopyIndex(config, seed=2)
    for rows in datasets.values():
        for split in HELD_OUT:
            index.add(text for group in _texts_by_example(rows, split) for text in group)
    return {name: sum(index.near_copied_groups(_texts_by_example(rows, "train"))) for name, rows in datasets.items()}


def shared_documents(rows: SourceRows) -> int:
    """Documents that are positives of a train and of a held-out example: unavoidable where the corpus is shared."""
    train = {item.id for example in rows.examples["train"] for item in example.positives}
    held_out = {item.id for split in HELD_OUT for example in rows.examples[split] for item in example.positives}
    return len(train & held_out)


def _texts_by_example(rows: SourceRows, split: str) -> list[list[str]]:
    """The texts of each example that must not stand on two sides."""
    texts = {row.id: document_text(row.title, row.text) for row in rows.documents} if rows.documents_split else {}
    compared = rows.documents_split and rows.task is not TaskType.CLASSIFICATION  # there, the query is the document
    return [
        [example.query, *(texts[item.id] for item in example.positives if compared)] for example in rows.examples[split]
    ]


def _drop_held_out_negatives(rows: SourceRows) -> None:
    held_out = {item.id for split in HELD_OUT for example in rows.examples[split] for item in example.positives}

    def cleaned(example: TrainingExample) -> TrainingExample:
        kept = tuple(item for item in example.negatives if item.id not in held_out)
        return example if len(kept) == len(example.negatives) else replace(example, negatives=kept)

    rows.examples["train"] = [cleaned(example) for example in rows.examples["train"]]
