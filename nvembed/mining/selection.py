"""The selection of negatives over whole arrays: which candidates of each query a rule allows, and why not the others.

`decide` is the one selection; `select` applies it to what a search stored, `mine_vectors` to what it searches itself.
A search stores the best documents, the number of documents at or above the ceiling that was searched, and the best
documents below it. Together they are the ranking with at most one gap, between the end of the plain list and the
ceiling. Another rule can be applied without searching again as long as it depends neither on the gap nor on what lies
behind the end.

Shapes: Q queries of a group, B of a block, C candidates of a query (padded), P of all queries, K selected, H equal
to a text that is never a negative.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from nvembed.mining.lists import ScoredLists, flat, grouped, joined, padded, places_of
from nvembed.mining.rules import ABSENT, Limits, first_allowed
from nvembed.types import UserError

BLOCK = 1024  # queries whose padded candidates are in a core's cache together


class Reason(enum.StrEnum):
    """Why a candidate is not a negative. Checked in this order; the first that holds is counted."""

    KNOWN_POSITIVE = "known_positive"
    DUPLICATE_TEXT = "duplicate_of_positive_or_query"
    TOO_CLOSE = "too_close_to_positive"
    REPEATED_TEXT = "repeats_a_kept_negative"
    OUTSIDE_RANKS = "outside_the_ranks"
    NEAR_DUPLICATE = "nearly_repeats_a_positive"
    FILTERED = "candidate_filter_finds_too_close"


UNDECIDED, NEGATIVE = 0, 1
CODE = {reason: 2 + place for place, reason in enumerate(Reason)}
# A costly check of candidates, two arrays of equal length that name them: int8, 0 or the code of the reason.
Check = Callable[[np.ndarray, np.ndarray], np.ndarray]


class NeedsSearchError(UserError):
    """A rule depends on documents that were not searched for."""


# -- the selection ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Candidates of some queries, best first.

    Attributes:
        score_BC: float64.
        present_BC: bool, False where a query has no more candidates.
        never_BC: bool, known positives and what has the text of one, or of the query.
        hash_BC: int64 text hashes; None where all texts differ.
        rank_BC: int64 ranks (1-based) among all documents; None where ranks are places.
    """

    score_BC: np.ndarray
    present_BC: np.ndarray
    never_BC: np.ndarray
    hash_BC: np.ndarray | None = None
    rank_BC: np.ndarray | None = None


def decide(block: Block, limits: Limits, count: int, check: Check | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` candidates of each query that may be negatives.

    Args:
        limits: the rule's, of these queries.
        check: by row and column; called only for candidates that nothing else refuses.

    Returns:
        int8 [B, C]: `NEGATIVE`, the `CODE` of a reason, or `UNDECIDED` behind the last negative;
        and bool [B, C]: negatives.
    """
    free_BC = (block.score_BC < limits.ceiling_Q[:, None]) & block.present_BC
    free_BC &= ~block.never_BC
    rank = np.arange(1, free_BC.shape[1] + 1) if block.rank_BC is None else block.rank_BC
    ranked_BC = rank >= limits.first
    if limits.last is not None:
        ranked_BC = ranked_BC & (rank <= limits.last)
    allowed_BC = free_BC & ranked_BC
    refused_BC, checked_BC = np.zeros(free_BC.shape, dtype=np.int8), np.zeros(free_BC.shape, dtype=bool)
    while True:
        repeated_BC = _repeated(free_BC, allowed_BC, block.hash_BC, count)
        first_BC = allowed_BC if repeated_BC is None else allowed_BC & ~repeated_BC
        place_BC = np.cumsum(first_BC, axis=1, dtype=np.int32)
        kept_BC = first_BC & (place_BC <= count)
        row, column = np.nonzero(kept_BC & ~checked_BC)
        if check is None or not len(row):
            break
        refused_BC[row, column] = check(row, column)
        checked_BC[row, column] = True
        allowed_BC = allowed_BC & (refused_BC == 0)
    code_BC = np.where(free_BC, np.int8(CODE[Reason.OUTSIDE_RANKS]), np.int8(CODE[Reason.TOO_CLOSE]))
    if repeated_BC is not None:
        code_BC[repeated_BC] = CODE[Reason.REPEATED_TEXT]
    np.copyto(code_BC, refused_BC, where=refused_BC > 0)
    code_BC[block.never_BC] = CODE[Reason.DUPLICATE_TEXT]
    code_BC[kept_BC] = NEGATIVE
    code_BC[~(block.present_BC & ((place_BC < count) | kept_BC))] = UNDECIDED
    return code_BC, kept_BC


def _repeated(free_BC: np.ndarray, allowed_BC: np.ndarray, hash_BC: np.ndarray | None, count: int) -> np.ndarray | None:
    """bool [B, C]: candidates with the text of an allowed one before them; None where no decision depends on it.

    A query with enough allowed candidates of different texts needs no look behind the last of them.
    """
    if hash_BC is None or not hash_BC.shape[1]:
        return None
    first_BK = first_allowed(allowed_BC, min(count, hash_BC.shape[1]))
    texts_BK = np.sort(np.take_along_axis(hash_BC, np.maximum(first_BK, 0), axis=1), axis=1)
    open_B = (first_BK[:, -1] == ABSENT) & (free_BC.sum(axis=1) > 1)
    open_B |= (texts_BK[:, 1:] == texts_BK[:, :-1]).any(axis=1) & (first_BK[:, -1] != ABSENT)
    rows_b = np.flatnonzero(open_B)
    if len(rows_b):
        texts_bC = np.sort(hash_BC[rows_b], axis=1)
        rows_b = rows_b[(texts_bC[:, 1:] == texts_bC[:, :-1]).any(axis=1)]
    if not len(rows_b):
        return None
    out_BC = np.zeros(hash_BC.shape, dtype=bool)
    row_F, column_F = np.nonzero(free_BC[rows_b])
    hash_F, allowed_F = hash_BC[rows_b[row_F], column_F], allowed_BC[rows_b[row_F], column_F]
    order_F = np.lexsort((column_F, hash_F, row_F))
    row_F, column_F, hash_F, allowed_F = row_F[order_F], column_F[order_F], hash_F[order_F], allowed_F[order_F]
    new_F = np.ones(len(order_F), dtype=bool)
    new_F[1:] = (row_F[1:] != row_F[:-1]) | (hash_F[1:] != hash_F[:-1])
    before_F = np.cumsum(allowed_F) - allowed_F  # allowed ones before it, of its text and all earlier ones
    first_F = np.maximum.accumulate(np.where(new_F, np.arange(len(order_F)), 0))
    again_F = before_F > before_F[first_F]
    out_BC[rows_b[row_F[again_F]], column_F[again_F]] = True
    return out_BC


def in_lists(lists: tuple[np.ndarray, np.ndarray], rows_B: np.ndarray, values_BC: np.ndarray) -> np.ndarray:
    """bool [B, C]: whether each query's list, of (starts, values), has the value."""
    start_B, end_B = lists[0][rows_B], lists[0][rows_B + 1]
    out_BC = np.zeros(values_BC.shape, dtype=bool)
    for column in range(int((end_B - start_B).max(initial=0))):
        has_b = np.flatnonzero(start_B + column < end_B)
        if len(has_b) == len(rows_B):
            out_BC |= values_BC == lists[1][start_B + column][:, None]
        else:
            out_BC[has_b] |= values_BC[has_b] == lists[1][start_B[has_b] + column][:, None]
    return out_BC


# -- on stored rankings -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rankings:
    """The stored rankings of a group of queries, and the documents that can never be their negatives.

    Attributes:
        plain: the best documents.
        under: the best below the ceiling that was searched.
        above_Q: int64, documents at or above that ceiling.
        searched_Q: float64, that ceiling.
        never: starts [Q + 1] and ids that must not be negatives; the positives are among them.
        never_hashes: starts [Q + 1] and int64 text hashes of those in the corpus, and of the query itself.
        depth: how long both lists may be.
    """

    plain: ScoredLists
    under: ScoredLists
    above_Q: np.ndarray
    searched_Q: np.ndarray
    never: tuple[np.ndarray, pa.StringArray]
    never_hashes: tuple[np.ndarray, np.ndarray]
    depth: int

    @classmethod
    def read(cls, queries: pa.Table, searched: pa.Table, depth: int) -> Rankings:
        """From the columns `hash` and `never` of queries, and what was searched for them (`PART_SCHEMA`, `ceiling`)."""
        own = np.arange(queries.num_rows + 1), queries.column("hash").to_numpy()
        start_Q, hashes = flat(searched.column("never_hashes"))
        return cls(
            ScoredLists.read(searched.column("plain"), searched.column("plain_hashes")),
            ScoredLists.read(searched.column("under"), searched.column("under_hashes")),
            searched.column("above").to_numpy(),
            searched.column("ceiling").to_numpy(),
            flat(queries.column("never")),
            joined(own, (start_Q, np.asarray(hashes))),
            depth,
        )

    @property
    def extended_Q(self) -> np.ndarray:
        """bool [Q]: whether the ranking continues below the ceiling, behind the plain list."""
        return (self.plain.length_Q == self.depth) & np.isfinite(self.searched_Q)

    @cached_property
    def candidates(self) -> ScoredLists:
        """All plain and then all under candidates, one behind the other."""
        return ScoredLists.end_to_end([self.plain, self.under])

    def plain_block(self, rows_B: np.ndarray) -> tuple[Block, slice]:
        """The plain lists of successive queries, and where their elements lie."""
        start_B = self.plain.start_Q[rows_B[0] : rows_B[-1] + 2]
        part = slice(start_B[0], start_B[-1])
        score_BC, hash_BC = (padded(start_B, values[part], 0) for values in (self.plain.score_P, self.plain.hash_P))
        present_BC = np.arange(score_BC.shape[1]) < np.diff(start_B)[:, None]
        never_BC = in_lists(self.never_hashes, rows_B, hash_BC) & present_BC
        return Block(score_BC, present_BC, never_BC, hash_BC), part

    def whole_block(self, rows_b: np.ndarray) -> tuple[Block, np.ndarray]:
        """The whole rankings of some queries, and int64 [b, C]: each one's place among all `candidates`."""
        first_b, above_b = self.plain.length_Q[rows_b], self.above_Q[rows_b]
        known_b = np.maximum(first_b - above_b, 0)  # so many of the list under the ceiling are in the plain list
        more_b = np.maximum(self.under.length_Q[rows_b] - known_b, 0) * self.extended_Q[rows_b]
        column_C = np.arange(int((first_b + more_b).max(initial=0)))
        behind_bC = column_C >= first_b[:, None]
        shift_b = len(self.plain.score_P) + self.under.start_Q[rows_b] + known_b - first_b
        at_bC = np.where(behind_bC, shift_b[:, None], self.plain.start_Q[rows_b][:, None]) + column_C
        present_bC = column_C < (first_b + more_b)[:, None]
        at_bC[~present_bC] = 0
        rank_bC = np.where(behind_bC, (above_b + known_b - first_b)[:, None], 0) + column_C + 1
        score_bC, hash_bC = self.candidates.score_P[at_bC], self.candidates.hash_P[at_bC]
        never_bC = in_lists(self.never_hashes, rows_b, hash_bC) & present_bC
        return Block(score_bC, present_bC, never_bC, hash_bC, rank_bC), at_bC


@dataclass(frozen=True)
class Selection:
    """Candidates of a group by `select`.

    Attributes:
        code_P: int8, of every plain candidate: `UNDECIDED`, `NEGATIVE` or the `CODE` of a reason, without the check.
        plain_Q: int64, negatives of each plain list, without the check.
        same_texts: int64 [H] each: place among all plain candidates, rising, and query of those with the text of the
            query or of one that must not be its negative. Every known positive is among them.
        selected: the negatives. Sampled rules: the pool to draw from.
        missing_Q: a message for each query whose selection depends on what was not searched, else "".
    """

    code_P: np.ndarray
    plain_Q: np.ndarray
    same_texts: tuple[np.ndarray, np.ndarray]
    selected: ScoredLists
    missing_Q: np.ndarray


def select(
    rankings: Rankings, limits: Limits, count: int, enough: int, *, capped: bool = False, check: Check | None = None
) -> Selection:
    """The first `count` candidates of every query that may be negatives.

    Args:
        limits: the rule's.
        enough: how many a query has to have.
        capped: whether more than enough are wanted only as a choice; then nothing behind them is missing.
        check: by query and place among `Rankings.candidates`.
    """
    plain = rankings.plain
    queries = len(plain.start_Q) - 1
    code_P, plain_Q = np.zeros(len(plain.score_P), dtype=np.int8), np.zeros(queries, dtype=np.int64)
    missing_Q = np.full(queries, "", dtype=object)
    owner_K, at_K, owner_H, at_H = ([np.empty(0, dtype=np.int64)] for _ in range(4))
    for start in range(0, queries, BLOCK):
        rows_B = np.arange(start, min(start + BLOCK, queries))
        block, part = rankings.plain_block(rows_B)
        row, column = np.nonzero(block.never_BC)
        owner_H.append(rows_B[row])
        at_H.append(plain.start_Q[rows_B[row]] + column)
        code_BC, kept_BC = decide(block, limits.of(rows_B), count)
        code_P[part] = code_BC[block.present_BC]
        plain_Q[rows_B] = kept_BC.sum(axis=1)
        short_B = plain_Q[rows_B] < max(count, enough) if check is None else np.ones(len(rows_B), dtype=bool)
        row, column = np.nonzero(kept_BC & ~short_B[:, None])
        owner_K.append(rows_B[row])
        at_K.append(plain.start_Q[rows_B[row]] + column)
        if short_B.any():
            rows_b = rows_B[short_B]
            block, at_bC = rankings.whole_block(rows_b)
            refuse = check and _by_place(check, rows_b, at_bC)
            code_bC, kept_bC = decide(block, limits.of(rows_b), count, refuse)
            row, column = np.nonzero(kept_bC)
            owner_K.append(rows_b[row])
            at_K.append(at_bC[row, column])
            enough_b = kept_bC.sum(axis=1) >= enough
            missing_b = _missing(rankings, limits.of(rows_b), rows_b, block, code_bC != UNDECIDED, enough_b)
            if capped:
                missing_b[enough_b] = ""
            missing_Q[rows_b] = missing_b
    order_K = np.argsort(np.concatenate(owner_K), kind="stable")
    start_Q = grouped(np.concatenate(owner_K), queries)
    selected = rankings.candidates.take(start_Q, np.concatenate(at_K)[order_K])
    same_H, whose_H = np.concatenate(at_H), np.concatenate(owner_H)
    known_H = places_of(whose_H, plain.ids.take(pa.array(same_H)), *rankings.never) >= 0
    code_P[same_H[(code_P[same_H] != UNDECIDED) & known_H]] = CODE[Reason.KNOWN_POSITIVE]
    return Selection(code_P, plain_Q, (same_H, whose_H), selected, missing_Q)


def _by_place(check: Check, rows_b: np.ndarray, at_bC: np.ndarray) -> Check:
    return lambda row, column: check(rows_b[row], at_bC[row, column])


def _missing(
    rankings: Rankings, limits: Limits, rows_b: np.ndarray, block: Block, decided_bC: np.ndarray, enough_b: np.ndarray
) -> np.ndarray:
    """str [b]: what would have to be searched; "" where the selection does not depend on it.

    Args:
        decided_bC: the candidates that the selection examined.
        enough_b: whether as many were selected as are wanted.
    """
    out_b = np.full(len(rows_b), "", dtype=object)
    first_b, above_b = rankings.plain.length_Q[rows_b], rankings.above_Q[rows_b]
    extended_b, floor_b = rankings.extended_Q[rows_b], rankings.searched_Q[rows_b]
    last = np.inf if limits.last is None else limits.last
    assert block.rank_BC is not None
    rank_bC = np.where(block.present_BC, block.rank_BC, 0)
    end_b = rank_bC.max(axis=1, initial=0)
    passed_b = ~enough_b | (np.where(decided_bC, rank_bC, 0).max(axis=1, initial=0) > first_b + 1)
    gap_b = extended_b & (above_b > first_b) & passed_b
    gap_b &= (limits.ceiling_Q > floor_b) & (limits.first <= above_b) & (first_b + 1 <= last)
    whole_b = (first_b < rankings.depth) | (extended_b & (rankings.under.length_Q[rows_b] < rankings.depth))
    for row in np.flatnonzero(gap_b):
        out_b[row] = (
            f"the rule needs ranks {first_b[row] + 1} to {above_b[row]} (scores from {floor_b[row]:.4f} up), "
            f"which were not searched. Search to depth {above_b[row]}, or with a rule whose ceiling is "
            f"{limits.ceiling_Q[row]:.4f} or more."
        )
    for row in np.flatnonzero(~gap_b & ~enough_b & ~whole_b & (end_b < last)):
        out_b[row] = f"the rule needs ranks behind {end_b[row]}, which were not searched."
    return out_b
