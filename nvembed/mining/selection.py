"""Which candidates become negatives: pure functions over ids, scores and text hashes, one query at a time.

What a rule asks (ceiling, ranks) comes from `rules.py`; here texts have a say as well: known positives and their copies
are refused, and so is a text that was kept under another id.

Random draws are seeded by a hash of (seed, data set, example id), so they do not depend on the order of the examples
or on how the work is divided.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import xxhash

Drawn = TypeVar("Drawn")


class Reason(enum.StrEnum):
    """Why a candidate is not a negative. Checked in this order; the first that holds is counted."""

    KNOWN_POSITIVE = "known_positive"
    DUPLICATE_TEXT = "duplicate_of_positive_or_query"
    TOO_CLOSE = "too_close_to_positive"
    REPEATED_TEXT = "repeats_a_kept_negative"
    OUTSIDE_RANKS = "outside_the_ranks"
    NEAR_DUPLICATE = "nearly_repeats_a_positive"
    JUDGED = "candidate_filter_finds_too_close"


@dataclass(frozen=True)
class Selection:
    """Positions of the kept candidates, best first, and for every refused candidate examined, why."""

    kept: list[int]
    rejected: dict[int, Reason] = field(default_factory=dict)


def select_negatives(
    candidate_ids: Sequence[str],
    scores: Sequence[float],
    hashes: Sequence[int],
    *,
    below: float,
    never_ids: Set[str],
    never_hashes: Set[int],
    count: int,
    ranks: tuple[int, int | None] = (1, None),
    rank_of: Sequence[int] | None = None,
    refuse: Callable[[int], Reason | None] | None = None,
) -> Selection:
    """The first `count` candidates that may be negatives.

    Args:
        candidate_ids: C ids, best score first.
        scores: C scores.
        hashes: C text hashes.
        below: the rule's ceiling for the query's positives; +inf keeps every score (random rule).
        never_ids: known positives of the query's text.
        never_hashes: hashes of the positives' texts and of the query itself.
        ranks: first and last rank allowed.
        rank_of: C ranks (1-based); by default the candidates' places.
        refuse: asked last, and only about candidates that nothing else refuses: costly checks go here.

    Returns:
        Candidates behind the last one kept are in neither list: nothing was decided about them.
    """
    kept: list[int] = []
    rejected: dict[int, Reason] = {}
    kept_hashes: set[int] = set()
    first_rank, last_rank = ranks[0], math.inf if ranks[1] is None else ranks[1]
    for index, (key, score, digest) in enumerate(zip(candidate_ids, scores, hashes, strict=True)):
        if len(kept) == count:
            break
        if key in never_ids:
            rejected[index] = Reason.KNOWN_POSITIVE
        elif digest in never_hashes:
            rejected[index] = Reason.DUPLICATE_TEXT
        elif not score < below:
            rejected[index] = Reason.TOO_CLOSE
        elif digest in kept_hashes:
            rejected[index] = Reason.REPEATED_TEXT
        elif not first_rank <= (index + 1 if rank_of is None else rank_of[index]) <= last_rank:
            rejected[index] = Reason.OUTSIDE_RANKS
        elif refuse is not None and (reason := refuse(index)) is not None:
            rejected[index] = reason
        else:
            kept.append(index)
            kept_hashes.add(digest)
    return Selection(kept, rejected)


def example_generator(seed: int, dataset: str, example_id: str) -> np.random.Generator:
    """Random generator of one example."""
    return np.random.Generator(np.random.PCG64(xxhash.xxh3_128_intdigest(f"{seed}\0{dataset}\0{example_id}".encode())))


def draw_order(generator: np.random.Generator, population: int, count: int) -> list[int]:
    """`count` distinct positions of `range(population)` in random order; fewer when there are no more.

    Each is a uniform draw without replacement; cost and memory depend on `count`, not on the population.
    """
    if count >= population:
        return [int(index) for index in generator.permutation(population)]
    if count * 4 >= population:
        return [int(index) for index in generator.permutation(population)[:count]]
    seen: dict[int, None] = {}
    while len(seen) < count:
        for index in generator.integers(population, size=count - len(seen)):
            seen.setdefault(int(index))
    return list(seen)


def draw_rounds(
    generator: np.random.Generator, population: int, count: int
) -> Generator[list[int], list[Drawn], list[Drawn]]:
    """Up to `count` good ones of a random order, as a coroutine, so that many examples can look up theirs together.

    It yields positions of `range(population)`, is sent those that were good (as positions or as what stands there), and
    draws more as long as too few were.
    """
    asked = 2 * count + 8
    while True:
        order = draw_order(generator, population, asked)
        kept = (yield order)[:count]
        if len(kept) == count or len(order) == population:
            return kept
        asked *= 4


def draw_accepted(
    generator: np.random.Generator, population: int, count: int, accept: Callable[[list[int]], list[int]]
) -> list[int]:
    """Up to `count` positions that `accept` keeps of a random order; see `draw_rounds`."""
    rounds: Generator[list[int], list[int], list[int]] = draw_rounds(generator, population, count)
    order = next(rounds)
    while True:
        try:
            order = rounds.send(accept(order))
        except StopIteration as done:
            kept: list[int] = done.value
            return kept


@dataclass(frozen=True)
class ClassExamples:
    """The training texts of a labelled data set, in id order, with their labels and text hashes."""

    ids: Sequence[str]
    labels: Sequence[str]
    hashes: Sequence[int]
    by_label: Mapping[str, list[int]]

    @classmethod
    def build(cls, ids: Sequence[str], labels: Sequence[str], hashes: Sequence[int]) -> ClassExamples:
        """Sort by id and index by label, so that draws do not depend on the order of the rows."""
        order = sorted(range(len(ids)), key=lambda index: ids[index])
        by_label: dict[str, list[int]] = {}
        for position, index in enumerate(order):
            by_label.setdefault(labels[index], []).append(position)
        return cls(
            [ids[index] for index in order],
            [labels[index] for index in order],
            [hashes[index] for index in order],
            by_label,
        )


def example_based(
    generator: np.random.Generator, texts: ClassExamples, example_id: str, label: str, digest: int, count: int
) -> tuple[str, list[str]] | None:
    """NV-Embed v2's example-based pair (4.2): positive from the same class, negatives from other classes.

    Texts equal to the example's own or to its positive, whatever their id or label, are not negatives.

    Returns:
        The positive's id and up to `count` negatives' ids; None when the class has no other text.
    """
    same = texts.by_label[label]

    def other_text(order: list[int]) -> list[int]:
        found = [same[place] for place in order]
        return [index for index in found if texts.ids[index] != example_id and texts.hashes[index] != digest]

    positive = draw_accepted(generator, len(same), 1, other_text)
    if not positive:
        return None

    def other_class(order: list[int]) -> list[int]:
        used, kept = {digest, texts.hashes[positive[0]]}, []
        for index in order:
            if texts.labels[index] != label and texts.hashes[index] not in used:
                used.add(texts.hashes[index])
                kept.append(index)
        return kept

    negatives = draw_accepted(generator, len(texts.ids), count, other_class)
    return texts.ids[positive[0]], [texts.ids[index] for index in negatives]
