"""Selection rules as numbers: ceilings on the score, windows of ranks, seeded draws, the cap on documents.

Every rule comes down to a ceiling on the score, a window of ranks and perhaps a draw. The ceilings are those of
NV-Retriever (arXiv 2407.15831, section 3): a candidate close to the positive is probably a positive without a label.
The paper's `s < ratio * p` only means that for p > 0; here `s < p - (1 - ratio) * |p|`, the same there and still
stricter than p itself elsewhere.

Uniform draws are seeded by a hash of (seed, data set, example id), so they depend neither on the order of the examples
nor on how the work is divided.

Shapes: Q queries, C candidates of a query, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from nvembed.mining.config import (
    CeilingRule,
    RankWindow,
    SampledTopK,
    SearchedRule,
    TopKAbs,
    TopKMarginPos,
    TopKPercPos,
    TopKShifted,
)
from nvembed.text.identity import mix

ABSENT = -1  # a column behind the last candidate that qualifies


@dataclass(frozen=True)
class Limits:
    """The ceilings and ranks that a rule sets.

    Attributes:
        ceiling_Q: float64 [Q]; a negative's score lies strictly below; +inf where the rule has no ceiling.
        first, last: ranks (1-based, among all documents) that may be negatives; no `last`: to the end.
    """

    ceiling_Q: np.ndarray
    first: int = 1
    last: int | None = None

    def of(self, rows_B: np.ndarray) -> Limits:
        """Those of some queries."""
        return replace(self, ceiling_Q=self.ceiling_Q[rows_B])


def ceilings(rule: CeilingRule | SearchedRule, lowest_Q: np.ndarray) -> np.ndarray:
    """float64 [Q]: what a negative's score must stay below.

    Args:
        lowest_Q: float64 [Q], the lowest score among each query's positives.
    """
    lowest_Q = np.asarray(lowest_Q, dtype=np.float64)
    match rule:
        case TopKPercPos():
            return lowest_Q - (1.0 - rule.max_negative_to_positive_ratio) * np.abs(lowest_Q)
        case TopKMarginPos():
            return lowest_Q - rule.margin
        case TopKAbs():
            return np.full(lowest_Q.shape, rule.max_score)
        case SampledTopK():
            return ceilings(rule.ceiling, lowest_Q)
        case _:
            return np.full(lowest_Q.shape, np.inf)


def rule_limits(rule: SearchedRule, lowest_Q: np.ndarray) -> Limits:
    """Ceiling and ranks of a rule, given the lowest positive's score of each query."""
    ceiling_Q = ceilings(rule, lowest_Q)
    match rule:
        case TopKShifted():
            return Limits(ceiling_Q, first=rule.shift + 1)
        case RankWindow():
            return Limits(ceiling_Q, first=rule.first, last=rule.last)
        case _:
            return Limits(ceiling_Q)


def first_allowed(allowed_QC: np.ndarray, count: int) -> np.ndarray:
    """int64 [Q, count]: columns of the first `count` allowed candidates of each query, then -1."""
    place_QC = np.cumsum(allowed_QC, axis=1)
    rows, columns = np.nonzero(allowed_QC & (place_QC <= count))
    out_QK = np.full((len(allowed_QC), count), ABSENT, dtype=np.int64)
    out_QK[rows, place_QC[rows, columns] - 1] = columns
    return out_QK


def picked(values_QC: np.ndarray, columns_QK: np.ndarray, absent: float = ABSENT) -> np.ndarray:
    """[Q, K]: the values in some columns of each query, `absent` where the column is -1."""
    values_QK = np.take_along_axis(values_QC, np.maximum(columns_QK, 0), axis=1)
    return np.where(columns_QK == ABSENT, absent, values_QK)


def draw_sampled(
    allowed_QC: np.ndarray,
    scores_QC: np.ndarray,
    count: int,
    rule: SampledTopK,
    query_keys_Q: np.ndarray,
    document_keys_QC: np.ndarray,
) -> np.ndarray:
    """int64 [Q, count]: columns of a draw without replacement from the first `rule.top` allowed, best first, then -1.

    Gumbel's trick: the largest of log-weight + Gumbel noise is a draw by weight, the `count` largest are one without
    replacement. The noise is a hash of the two keys, so neither order nor division can change it.

    Args:
        query_keys_Q: uint64 [Q], the seed and the query's identity.
        document_keys_QC: uint64 [Q, C], the candidates' identities.
    """
    pool_QK = first_allowed(allowed_QC, rule.top)
    noise_QK = gumbel(query_keys_Q[:, None], np.take_along_axis(document_keys_QC, np.maximum(pool_QK, 0), axis=1))
    if rule.temperature is not None:
        noise_QK = noise_QK + picked(scores_QC, pool_QK, 0.0) / rule.temperature
    noise_QK = np.where(pool_QK == ABSENT, -np.inf, noise_QK)
    drawn_QC = np.zeros(allowed_QC.shape, dtype=bool)
    for column_Q in np.take_along_axis(pool_QK, np.argsort(-noise_QK, axis=1, kind="stable")[:, :count], axis=1).T:
        row = np.flatnonzero(column_Q != ABSENT)
        drawn_QC[row, column_Q[row]] = True
    return first_allowed(drawn_QC, count)


def gumbel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Gumbel noise from a pair of uint64 keys (broadcast): the same pair, the same number, on any machine."""
    mixed = mix(mix(np.asarray(left, dtype=np.uint64)) ^ np.asarray(right, dtype=np.uint64))
    uniform = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def cap_documents(
    documents_QC: np.ndarray, scores_QC: np.ndarray, count: int, cap: int, order_Q: np.ndarray | None = None
) -> np.ndarray:
    """Give every query up to `count` of its candidates so that no document serves more than `cap` queries.

    Deferred acceptance (Gale and Shapley 1962, with several places for queries and documents): each query asks for its
    next best candidates, a document accepts the `cap` queries that score it highest and refuses the others. The outcome
    is the same in whatever order the queries ask, and no query could do better without another's loss of a better
    score.

    Args:
        documents_QC: int64 [Q, C], candidates that qualify, in the query's order of preference; -1 behind the last.
        scores_QC: float64 [Q, C].
        order_Q: int64 [Q], settles equal scores (smaller wins); by default the row number.

    Returns:
        int64 [Q, count]: columns, in the query's order, then -1. Memory: about 60 bytes per candidate.
    """
    queries, width = documents_QC.shape
    order_Q = np.arange(queries) if order_Q is None else np.asarray(order_Q)
    held_QC = np.zeros((queries, width), dtype=bool)
    asked_Q = np.zeros(queries, dtype=np.int64)
    length_Q = (documents_QC != ABSENT).sum(axis=1)
    column_C = np.arange(width)
    while True:
        want_Q = np.minimum(count - held_QC.sum(axis=1), length_Q - asked_Q)
        if not (want_Q > 0).any():
            return first_allowed(held_QC, count)
        ask_QC = (column_C >= asked_Q[:, None]) & (column_C < (asked_Q + want_Q)[:, None])
        asked_Q += want_Q
        held_QC |= ask_QC
        rows, columns = np.nonzero(held_QC)
        documents, scores = documents_QC[rows, columns], scores_QC[rows, columns]
        order = np.lexsort((order_Q[rows], -scores, documents))
        place = np.arange(len(order)) - np.searchsorted(documents[order], documents[order], side="left")
        sent_away = order[place >= cap]
        held_QC[rows[sent_away], columns[sent_away]] = False


def consistent(rank_Q: np.ndarray, max_rank: int) -> np.ndarray:
    """bool [Q]: whether the best positive of an example ranks within the first `max_rank`.

    Args:
        rank_Q: int64 [Q], 1-based rank among all documents; 0 where it lies below the searched depth.
    """
    return (rank_Q >= 1) & (rank_Q <= max_rank)


# -- uniform draws -----------------------------------------------------------------------------------------------------


def example_generator(seed: int, dataset: str, example_id: str) -> np.random.Generator:
    """Random generator of one example."""
    return np.random.Generator(np.random.PCG64(xxhash.xxh3_128_intdigest(f"{seed}\0{dataset}\0{example_id}".encode())))


def draw_order(generator: np.random.Generator, population: int, count: int) -> list[int]:
    """`count` distinct positions of `range(population)` in random order; fewer when there are no more.

    Each is a uniform draw without replacement; cost and memory depend on `count`, not on the population.
    """
    if count * 4 >= population:
        return [int(index) for index in generator.permutation(population)[:count]]
    seen: dict[int, None] = {}
    while len(seen) < count:
        for index in generator.integers(population, size=count - len(seen)):
            seen.setdefault(int(index))
    return list(seen)


def draw_accepted(
    generator: np.random.Generator, population: int, count: int, accept: Callable[[list[int]], list[int]]
) -> list[int]:
    """Up to `count` positions of `range(population)` in a random order, those that `accept` lets through.

    More are drawn while too few qualify.
    """
    drawn = first_draw(count)
    while True:
        order = draw_order(generator, population, drawn)
        accepted = accept(order)[:count]
        if len(accepted) == count or len(order) == population:
            return accepted
        drawn *= 4


def first_draw(count: int) -> int:
    """How many positions are drawn at first for `count` that qualify."""
    return 2 * count + 8


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
        indices = [same[place] for place in order]
        return [index for index in indices if texts.ids[index] != example_id and texts.hashes[index] != digest]

    positive = draw_accepted(generator, len(same), 1, other_text)
    if not positive:
        return None

    def other_class(order: list[int]) -> list[int]:
        used, others = {digest, texts.hashes[positive[0]]}, []
        for index in order:
            if texts.labels[index] != label and texts.hashes[index] not in used:
                used.add(texts.hashes[index])
                others.append(index)
        return others

    negatives = draw_accepted(generator, len(texts.ids), count, other_class)
    return texts.ids[positive[0]], [texts.ids[index] for index in negatives]
