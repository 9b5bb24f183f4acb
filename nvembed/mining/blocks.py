"""Selection for many queries at once: `selection.select_negatives` without a Python object per candidate.

For what only needs ids, scores, ranks and text hashes: every searched rule, refusal of positives and of repeated texts.
Checks that read texts or ask another model go query by query (`choosing.Chooser`); a test holds the two equal.

Shapes: Q queries of a group, B of a block, C candidates of a query (padded), P of all queries, K kept of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from nvembed.mining.lists import Lists, codes, flat, joined, owners
from nvembed.mining.rules import FREE, Limits, first_allowed
from nvembed.mining.selection import Reason

BLOCK = 1024  # queries whose padded candidates are in a core's cache together
UNDECIDED, KEPT = 0, 1
CODE = {reason: 2 + place for place, reason in enumerate(Reason)}


@dataclass(frozen=True)
class Problem:
    """What was searched for a group of queries, and what is known about them.

    Attributes:
        plain: the best documents.
        under: the best below the ceiling that was searched.
        above_Q: int64, documents at or above that ceiling.
        searched_Q: float64, that ceiling.
        never: starts [Q + 1] and ids that must not be negatives; the positives are among them.
        never_hashes: starts [Q + 1] and int64 text hashes of those in the corpus, and of the query itself.
        depth: how long both lists may be.
    """

    plain: Lists
    under: Lists
    above_Q: np.ndarray
    searched_Q: np.ndarray
    never: tuple[np.ndarray, pa.StringArray]
    never_hashes: tuple[np.ndarray, np.ndarray]
    depth: int

    @classmethod
    def read(cls, queries: pa.Table, searched: pa.Table, depth: int) -> Problem:
        """From the columns `hash` and `never` of queries, and what was searched for them (`PART_SCHEMA`, `ceiling`)."""
        own = np.arange(queries.num_rows + 1), queries.column("hash").to_numpy()
        start_Q, hashes = flat(searched.column("never_hashes"))
        return cls(
            Lists.read(searched.column("plain"), searched.column("plain_hashes")),
            Lists.read(searched.column("under"), searched.column("under_hashes")),
            searched.column("above").to_numpy(),
            searched.column("ceiling").to_numpy(),
            flat(queries.column("never")),
            joined(own, (start_Q, np.asarray(hashes))),
            depth,
        )

    def scored(self, at_K: np.ndarray) -> tuple[pa.StringArray, pa.DoubleArray]:
        """Ids and scores of candidates by their place among all plain and then all under candidates."""
        count = len(self.plain.score_P)
        behind_K = at_K >= count
        sides = (self.plain, at_K[~behind_K]), (self.under, at_K[behind_K] - count)
        order_K = np.empty(len(at_K), dtype=np.int64)
        order_K[np.concatenate([np.flatnonzero(~behind_K), np.flatnonzero(behind_K)])] = np.arange(len(at_K))
        ids = pa.concat_arrays([lists.ids.take(pa.array(at)) for lists, at in sides])
        scores = np.concatenate([lists.score_P[at] for lists, at in sides])
        return ids.take(pa.array(order_K)), pa.array(scores[order_K])

    @cached_property
    def same_texts(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [H] each: place among all plain candidates, rising, and query of those with the text of the query or of
        one that must not be its negative. Every known positive is among them."""
        plain, found = self.plain, [np.empty(0, dtype=np.int64)]
        for start in range(0, len(plain.start_Q) - 1, BLOCK):
            rows_B = np.arange(start, min(start + BLOCK, len(plain.start_Q) - 1))
            there_BC, part = _block(plain, rows_B)
            same_BC = _holds(self.never_hashes, rows_B, _padded(plain.hash_P[part], there_BC)) & there_BC
            row, column = np.nonzero(same_BC)
            found.append(plain.start_Q[rows_B[row]] + column)
        at_H = np.concatenate(found)
        return at_H, np.searchsorted(plain.start_Q, at_H, side="right") - 1

    @cached_property
    def known_H(self) -> np.ndarray:
        """bool [H]: which of `same_texts` are known positives, not others with their text."""
        at_H, owner_H = self.same_texts
        return members(owner_H, self.plain.ids.take(pa.array(at_H)), *self.never)

    @property
    def extended_Q(self) -> np.ndarray:
        """bool [Q]: whether the ranking goes on below the ceiling, behind the plain list."""
        return (self.plain.length_Q == self.depth) & np.isfinite(self.searched_Q)

    @property
    def known_Q(self) -> np.ndarray:
        """int64 [Q]: how many of the lists under the ceiling are in the plain lists."""
        return np.maximum(self.plain.length_Q - self.above_Q, 0)


@dataclass(frozen=True)
class Chosen:
    """What was decided.

    Attributes:
        code_P: int8, of every plain candidate: undecided, kept, or a reason (`CODE`).
        plain_Q: int64, how many of each plain list were kept.
        owner_K, at_K: int64; a kept candidate's query and place among all plain and then all under candidates, by
            query, best first. Sampled rules: the pool to draw from.
        needs_Q: bool, whether the choice depends on what was not searched.
    """

    code_P: np.ndarray
    plain_Q: np.ndarray
    owner_K: np.ndarray
    at_K: np.ndarray
    needs_Q: np.ndarray


def choose(problem: Problem, limits: Limits, count: int, enough: int, *, capped: bool = False) -> Chosen:
    """The first `count` candidates of every query that may be negatives.

    Args:
        limits: the rule's.
        enough: how many a query has to have.
        capped: whether more than enough are wanted only as a choice; what lies behind them is then not asked for.
    """
    plain = problem.plain
    queries = len(plain.start_Q) - 1
    code_P = np.zeros(len(plain.score_P), dtype=np.int8)
    plain_Q, needs_Q = np.zeros(queries, dtype=np.int64), np.zeros(queries, dtype=bool)
    none = np.empty(0, dtype=np.int64)
    kept: list[tuple[np.ndarray, np.ndarray]] = [(none, none)]
    for start in range(0, queries, BLOCK):
        rows_B = np.arange(start, min(start + BLOCK, queries))
        there_BC, part = _block(plain, rows_B)
        score_BC, hash_BC = (_padded(values[part], there_BC) for values in (plain.score_P, plain.hash_P))
        code_BC, kept_BC = _decide(problem, limits, count, rows_B, score_BC, hash_BC, there_BC, None)
        code_P[part] = code_BC[there_BC]
        plain_Q[rows_B] = kept_BC.sum(axis=1)
        full_B = plain_Q[rows_B] >= max(count, enough)
        row, column = np.nonzero(kept_BC & full_B[:, None])
        kept.append((rows_B[row], plain.start_Q[rows_B[row]] + column))
        if not full_B.all():
            left_b = rows_B[~full_B]
            owner_k, at_k, needs_Q[left_b] = _longer(problem, limits, count, enough, left_b, capped)
            kept.append((owner_k, at_k))
    owner_K, at_K = (np.concatenate(side) for side in zip(*kept, strict=True))
    order_K = np.argsort(owner_K, kind="stable")
    at_H = problem.same_texts[0]
    known_H = (code_P[at_H] != UNDECIDED) & problem.known_H
    code_P[at_H[known_H]] = CODE[Reason.KNOWN_POSITIVE]
    return Chosen(code_P, plain_Q, owner_K[order_K], at_K[order_K], needs_Q)


def _block(lists: Lists, rows_B: np.ndarray) -> tuple[np.ndarray, slice]:
    """bool [B, C], where successive lists hold something, and where their elements lie."""
    length_B = lists.length_Q[rows_B]
    there_BC = np.arange(int(length_B.max(initial=0))) < length_B[:, None]
    return there_BC, slice(lists.start_Q[rows_B[0]], lists.start_Q[rows_B[-1] + 1])


def _padded(values_P: np.ndarray, there_BC: np.ndarray) -> np.ndarray:
    """[B, C] of lists that follow each other; a view where all are of one length."""
    if len(values_P) == there_BC.size:
        return values_P.reshape(there_BC.shape)
    out_BC = np.zeros(there_BC.shape, dtype=values_P.dtype)
    out_BC[there_BC] = values_P
    return out_BC


def _longer(
    problem: Problem, limits: Limits, count: int, enough: int, rows_b: np.ndarray, capped: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(owner, place) of what is kept of whole rankings, and who needs what was not searched."""
    plain, under = problem.plain, problem.under
    first_b, extended_b = plain.length_Q[rows_b], problem.extended_Q[rows_b]
    known_b, above_b = problem.known_Q[rows_b], problem.above_Q[rows_b]
    more_b = np.where(extended_b, np.maximum(under.length_Q[rows_b] - known_b, 0), 0)
    length_b = first_b + more_b
    column_C = np.arange(int(length_b.max(initial=0)))
    behind_bC = column_C >= first_b[:, None]
    shift_b = len(plain.score_P) + under.start_Q[rows_b] + known_b - first_b
    at_bC = np.where(behind_bC, shift_b[:, None], plain.start_Q[rows_b][:, None]) + column_C
    at_bC[column_C >= length_b[:, None]] = 0
    rank_bC = np.where(behind_bC, (above_b + known_b - first_b)[:, None], 0) + column_C + 1
    score_bC, hash_bC = (_gathered(problem, name, at_bC) for name in ("score_P", "hash_P"))
    there_bC = column_C < length_b[:, None]
    code_bC, kept_bC = _decide(problem, limits, count, rows_b, score_bC, hash_bC, there_bC, rank_bC)
    row, column = np.nonzero(kept_bC)

    # `Ranking.check` for all of them; whoever is named here is decided again query by query (`choosing.Chooser`)
    enough_b = kept_bC.sum(axis=1) >= enough
    decided_b = (code_bC != UNDECIDED).sum(axis=1)
    ceiling_b, floor_b = limits.ceiling_Q[rows_b], problem.searched_Q[rows_b]
    last = np.inf if limits.last is None else limits.last
    every_b = np.arange(len(rows_b))

    def rank_at(place_b: np.ndarray) -> np.ndarray:
        if not len(column_C):
            return np.zeros(len(rows_b), dtype=np.int64)
        return np.where(place_b > 0, rank_bC[every_b, np.maximum(place_b - 1, 0)], 0)

    passed_b = ~enough_b | (rank_at(decided_b) > first_b + 1)
    gap_b = extended_b & (above_b > first_b)
    needs_b = gap_b & passed_b & (ceiling_b > floor_b) & (limits.first <= above_b) & (first_b + 1 <= last)
    whole_b = (first_b < problem.depth) | (extended_b & (under.length_Q[rows_b] < problem.depth))
    needs_b |= ~enough_b & ~whole_b & (rank_at(length_b) < last)
    if capped:
        needs_b &= ~enough_b
    return rows_b[row], at_bC[row, column], needs_b


def _decide(
    problem: Problem,
    limits: Limits,
    count: int,
    rows_B: np.ndarray,
    score_BC: np.ndarray,
    hash_BC: np.ndarray,
    there_BC: np.ndarray,
    rank_BC: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """int8 [B, C] codes and bool [B, C] kept of some queries' candidates.

    Args:
        rank_BC: their ranks (1-based); None: they lie in the plain list, ranks are places.
    """
    never_BC = _holds(problem.never_hashes, rows_B, hash_BC) & there_BC
    below_BC = (score_BC < limits.ceiling_Q[rows_B][:, None]) & there_BC
    free_BC = below_BC & ~never_BC
    rank = np.arange(1, score_BC.shape[1] + 1) if rank_BC is None else rank_BC
    ranked_BC = rank >= limits.first
    if limits.last is not None:
        ranked_BC = ranked_BC & (rank <= limits.last)
    allowed_BC = free_BC & ranked_BC
    repeated_BC = _repeated(free_BC, allowed_BC, hash_BC, count)
    if repeated_BC is not None:
        allowed_BC &= ~repeated_BC
    place_BC = np.cumsum(allowed_BC, axis=1, dtype=np.int32)
    kept_BC = allowed_BC & (place_BC <= count)
    decided_BC = there_BC & ((place_BC < count) | kept_BC)
    code_BC = np.where(free_BC, np.int8(CODE[Reason.OUTSIDE_RANKS]), np.int8(CODE[Reason.TOO_CLOSE]))
    if repeated_BC is not None:
        code_BC[repeated_BC] = CODE[Reason.REPEATED_TEXT]
    code_BC[never_BC] = CODE[Reason.DUPLICATE_TEXT]
    code_BC[kept_BC] = KEPT
    code_BC[~decided_BC] = UNDECIDED
    return code_BC, kept_BC


def _gathered(problem: Problem, name: str, at_BC: np.ndarray) -> np.ndarray:
    """Scores or hashes by place among all plain and then all under candidates."""
    plain, under = getattr(problem.plain, name), getattr(problem.under, name)
    if not len(plain):
        return np.zeros(at_BC.shape, dtype=plain.dtype)
    behind_BC = at_BC >= len(plain)
    out_BC = plain[np.where(behind_BC, 0, at_BC)]
    out_BC[behind_BC] = under[at_BC[behind_BC] - len(plain)]
    return np.asarray(out_BC)


def _holds(lists: tuple[np.ndarray, np.ndarray], rows_B: np.ndarray, values_BC: np.ndarray) -> np.ndarray:
    """bool [B, C]: whether each query's list has the value."""
    start_B, end_B = lists[0][rows_B], lists[0][rows_B + 1]
    out_BC = np.zeros(values_BC.shape, dtype=bool)
    for column in range(int((end_B - start_B).max(initial=0))):
        has_b = np.flatnonzero(start_B + column < end_B)
        if len(has_b) == len(rows_B):
            out_BC |= values_BC == lists[1][start_B + column][:, None]
        else:
            out_BC[has_b] |= values_BC[has_b] == lists[1][start_B[has_b] + column][:, None]
    return out_BC


def _repeated(free_BC: np.ndarray, allowed_BC: np.ndarray, hash_BC: np.ndarray, count: int) -> np.ndarray | None:
    """bool [B, C]: candidates with the text of an allowed one before them; None where no decision depends on it.

    A query with enough allowed candidates of different texts needs no look behind the last of them.
    """
    if not hash_BC.shape[1]:
        return None
    first_BK = first_allowed(allowed_BC, min(count, hash_BC.shape[1]))
    texts_BK = np.sort(np.take_along_axis(hash_BC, np.maximum(first_BK, 0), axis=1), axis=1)
    open_B = (first_BK[:, -1] == FREE) & (free_BC.sum(axis=1) > 1)
    open_B |= (texts_BK[:, 1:] == texts_BK[:, :-1]).any(axis=1) & (first_BK[:, -1] != FREE)
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


def members(owner_H: np.ndarray, ids: pa.Array, start_Q: np.ndarray, values: pa.Array) -> np.ndarray:
    """bool [H]: whether each id is in its query's list."""
    (ours_H, theirs_N), above = codes(ids, values)
    return np.isin(owner_H * above + ours_H, owners(start_Q) * above + theirs_N)
