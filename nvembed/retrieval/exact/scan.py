"""The exact search's inner loop: a block of queries against one segment of documents.

bf16 products (fp32 where the processor has no bf16) only *propose*. A running lower bound of each query's k-th score
gives a cut; what lies below the cut, widened by the proven error (`bounds.py`), cannot belong to the result and
is dropped; the rest is scored again in fp64. A query whose band of doubt holds more documents than `_LIMIT` allows is
not rescored whole: its best proposals are, and its certificate takes the best possible score of the others.
Certificates that fail are searched again with fp32 products, whose band is about a thousand times thinner.

Two lists at once: the plain best `plain`, and the best `under` strictly below a ceiling of each query's own; with it
the exact number of documents at or above that ceiling.

Shapes: Q queries of a block, N documents of a tile, S of a segment, D dimensions, P (query, document) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from nvembed.retrieval.exact.bounds import BF16_OUTPUT_ROUNDOFF, LARGEST, bf16_error, fp32_error
from nvembed.retrieval.exact.device import Vectors, hits, kth_largest, scores_of_pairs
from nvembed.retrieval.exact.topk import Best
from nvembed.types import UserError

QUERY_BLOCK = 1024
TILE = 8192
DEVICE_TILE = 1 << 16
FIRST_TILE = 2048
_LIMIT = (4, 256)  # proposals rescored per query and segment: 4 k + 256
_SETTLE_AT = 1 << 21  # proposals that wait before they are settled in between: bounds memory when everything ties


class Segment:
    """Documents that are searched together: ids and vectors."""

    def __init__(self, ids_S: np.ndarray, matrix_SD: np.ndarray, precision: str, device: str) -> None:
        self.ids_S, self.vectors = ids_S, Vectors(matrix_SD, precision, device)
        bad = self.vectors.unusable()
        if bad is not None:
            name = ids_S[bad : bad + 1].tolist()[0]
            why = f"is not finite, or longer than {LARGEST:.0e}"
            raise UserError(f"the document vector with id {name!r} {why}; correct or remove it.")

    def __len__(self) -> int:
        return len(self.ids_S)


@dataclass
class Proposals:
    """(query, document) pairs that may belong to the result, with their approximate scores."""

    rows: list[np.ndarray] = field(default_factory=list)
    columns: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    count: int = 0

    def add(self, rows_P: np.ndarray, columns_P: np.ndarray, values_P: np.ndarray) -> None:
        self.rows.append(rows_P)
        self.columns.append(columns_P)
        self.values.append(values_P)
        self.count += len(rows_P)

    def joined(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.concatenate(self.rows), np.concatenate(self.columns), np.concatenate(self.values)


class QueryBlock:
    """Running result of at most a few thousand queries.

    Attributes:
        plain, under: `Best`; `under` is None without ceilings.
        above_Q: int64, documents at or above the ceiling so far (0 without ceilings or when not counted).
        dropped_Q, dropped_under_Q: float64, everything left out of `plain` (of `under`) scores strictly below;
            -inf where nothing was.
        again_Q: bool, queries of which some segment was searched again in fp32.
    """

    def __init__(
        self,
        query_QD: np.ndarray,
        *,
        plain: int,
        under: int = 0,
        ceiling_Q: np.ndarray | None = None,
        count_above: bool = False,
        precision: str = "fp32",
        device: str = "cpu",
        tile: int = TILE,
        id_type: np.dtype | type = object,
    ) -> None:
        queries = len(query_QD)
        self.query_QD = np.ascontiguousarray(query_QD, dtype=np.float32)
        self.precision, self.device = precision, device
        self.tile = tile if device == "cpu" else max(tile, DEVICE_TILE)
        self.vectors = Vectors(self.query_QD, precision, device)
        if self.vectors.unusable() is not None:
            raise UserError(f"a query vector is not finite, or longer than {LARGEST:.0e}; correct or remove it.")
        self.ceiling_Q = ceiling_Q if under else None
        self.count_above = count_above and self.ceiling_Q is not None
        self.plain = Best(queries, plain, id_type) if plain else None
        self.under = Best(queries, under, id_type) if self.ceiling_Q is not None else None
        self.above_Q = np.zeros(queries, dtype=np.int64)
        self.dropped_Q = np.full(queries, -np.inf)
        self.dropped_under_Q = np.full(queries, -np.inf)
        self.again_Q = np.zeros(queries, dtype=bool)

    # -- one segment --------------------------------------------------------------------------------------------------

    def add(self, segment: Segment) -> None:
        """Search a segment and merge its results."""
        if len(segment) == 0 or len(self.query_QD) == 0:
            return
        bound_Q = self._error(segment)
        scan = _Scan(self, segment, bound_Q)
        start, width = 0, min(FIRST_TILE, self.tile)
        while start < len(segment):
            scan.tile(start, min(start + width, len(segment)))
            start, width = start + width, self.tile
        scan.settle(len(segment))

    def _error(self, segment: Segment) -> np.ndarray:
        dim = self.query_QD.shape[1]
        if self.precision == "bf16":
            return bf16_error(self.vectors.sizes, segment.vectors.sizes, dim)
        return fp32_error(self.vectors.sizes.norm_N, segment.vectors.sizes.largest()[0], dim)

    def certificates(self) -> np.ndarray:
        """Margin of each query's result, float64 [Q], never negative.

        It is the k-th score less the best possible score of any document left out, the smaller of both lists; +inf
        where none was left out.
        """
        margin_Q = np.full(len(self.query_QD), np.inf)
        for best, dropped_Q in ((self.plain, self.dropped_Q), (self.under, self.dropped_under_Q)):
            if best is not None:
                left_out = np.isfinite(dropped_Q)
                margin_Q[left_out] = np.minimum(margin_Q, best.scores_QK[:, -1] - np.where(left_out, dropped_Q, 0))[
                    left_out
                ]
        return margin_Q


class _Scan:
    """The pass of one query block over one segment."""

    def __init__(self, block: QueryBlock, segment: Segment, bound_Q: np.ndarray) -> None:
        self.block, self.segment, self.bound_Q = block, segment, bound_Q
        # the rounding of the sum to bf16, relative to its result: 2^-8 (1 + 2^-8), with something to spare
        self.output = 1.02 * BF16_OUTPUT_ROUNDOFF if block.precision == "bf16" else 0.0
        self.proposals = Proposals()
        self.settled = 0  # documents of the segment before this one are merged
        self.above_before_Q = block.above_Q.copy()  # the count over them
        queries = len(block.query_QD)
        ceiling_Q = np.full(queries, np.inf) if block.ceiling_Q is None else block.ceiling_Q
        # approximate scores beyond these are surely at or above, surely below, the ceiling
        size_Q = np.where(np.isfinite(ceiling_Q), np.abs(ceiling_Q), 0.0)
        doubt_Q = bound_Q + self.output * (size_Q + bound_Q)
        self.over_Q, self.below_Q = ceiling_Q + doubt_Q, ceiling_Q - doubt_Q
        # lower bounds of the k best scores so far, plain and under the ceiling; the k-th first
        self.plain_QK = None if block.plain is None else block.plain.scores_QK[:, ::-1].copy()
        self.under_QK = None if block.under is None else block.under.scores_QK[:, ::-1].copy()

    def tile(self, start: int, stop: int) -> None:
        """Multiply, and collect the pairs that may belong to the result."""
        block = self.block
        approx_QN = block.vectors.fast_ND @ self.segment.vectors.fast_ND[start:stop].T
        self._first_bounds(approx_QN)
        cuts = [lows_QK[:, 0] for lows_QK in (self.plain_QK, self.under_QK) if lows_QK is not None]
        if block.count_above and block.ceiling_Q is not None:
            cuts.append(block.ceiling_Q)
        for rows_P, columns_P, values_P in hits(approx_QN, np.minimum.reduce(cuts) - self.bound_Q):
            self._take(rows_P, columns_P + np.int32(start), values_P)
        if self.proposals.count > _SETTLE_AT:
            self.settle(stop)

    def _first_bounds(self, approx_QN: torch.Tensor) -> None:
        """k documents of a tile bound the k-th score, if it has as many: where nothing else does yet; on a device
        always, as that spares proposals, which cost more there than products."""
        for name, ceiling_Q in (("plain_QK", None), ("under_QK", self.below_Q)):
            lows_QK: np.ndarray | None = getattr(self, name)
            if lows_QK is None or lows_QK.shape[1] > approx_QN.shape[1]:
                continue
            open_q = np.arange(len(lows_QK))
            if self.block.device == "cpu":
                open_q = np.flatnonzero(np.isneginf(lows_QK[:, 0]))
            if len(open_q) == 0:
                continue
            chosen = approx_QN if len(open_q) == len(lows_QK) else approx_QN[torch.from_numpy(open_q)]
            kth_q = kth_largest(chosen, lows_QK.shape[1], None if ceiling_Q is None else ceiling_Q[open_q])
            # as a floor under all k: documents that are proposed later take its place and are not counted twice
            lows_QK[open_q] = np.maximum(lows_QK[open_q], self._low(kth_q, self.bound_Q[open_q])[:, None])

    def _low(self, value_P: np.ndarray, bound_P: np.ndarray) -> np.ndarray:
        """Lower bound of the exact score, from the approximate one."""
        return value_P - np.where(np.isfinite(value_P), np.abs(value_P), 0.0) * self.output - bound_P

    def _take(self, rows_P: np.ndarray, columns_P: np.ndarray, values_P: np.ndarray) -> None:
        block = self.block
        if block.ceiling_Q is not None:
            over_P = values_P > self.over_Q[rows_P]
            if block.count_above:
                block.above_Q += np.bincount(rows_P[over_P], minlength=len(block.above_Q))
            keep_P = ~over_P if self.plain_QK is None else ~over_P | self._reaches(self.plain_QK, rows_P, values_P)
            rows_P, columns_P, values_P = rows_P[keep_P], columns_P[keep_P], values_P[keep_P]
        if len(rows_P) == 0:
            return
        self.proposals.add(rows_P, columns_P, values_P)
        low_P = self._low(values_P.astype(np.float64), self.bound_Q[rows_P])
        if self.plain_QK is not None:
            self.plain_QK = _raise(self.plain_QK, rows_P, low_P)
        if self.under_QK is not None:
            sure_P = values_P < self.below_Q[rows_P]
            self.under_QK = _raise(self.under_QK, rows_P[sure_P], low_P[sure_P])

    def _reaches(self, lows_QK: np.ndarray, rows_P: np.ndarray, values_P: np.ndarray) -> np.ndarray:
        """bool [P]: whether the exact score may reach the k-th of a list."""
        return values_P + np.abs(values_P) * self.output >= (lows_QK[:, 0] - self.bound_Q)[rows_P]

    # -- merging ------------------------------------------------------------------------------------------------------

    def settle(self, stop: int) -> None:
        """Score the proposals among the documents since the last call, and merge them."""
        block = self.block
        start, self.settled = self.settled, stop
        if self.proposals.count == 0:
            self.above_before_Q = self.block.above_Q.copy()
            return
        rows_P, columns_P, values_P = self.proposals.joined()
        self.proposals = Proposals()
        for_plain_P = np.zeros(len(rows_P), dtype=bool)
        for_under_P, doubt_P = for_plain_P, for_plain_P
        if self.plain_QK is not None:
            for_plain_P = self._reaches(self.plain_QK, rows_P, values_P)
        if self.under_QK is not None:
            maybe_below_P = values_P <= self.over_Q[rows_P]
            for_under_P = maybe_below_P & self._reaches(self.under_QK, rows_P, values_P)
            if block.count_above:
                doubt_P = maybe_below_P & (values_P >= self.below_Q[rows_P])
        needed = np.flatnonzero(for_plain_P | for_under_P | doubt_P)
        needed, crowded_q = self._within_limit(needed, rows_P)
        rows_P, columns_P, values_P = rows_P[needed], columns_P[needed], values_P[needed]
        scores_P = scores_of_pairs(block.vectors, rows_P, self.segment.vectors, columns_P)
        self._merge(rows_P, columns_P, values_P, scores_P)
        for best, lows_QK, dropped_Q in (
            (block.plain, self.plain_QK, block.dropped_Q),
            (block.under, self.under_QK, block.dropped_under_Q),
        ):
            if best is not None and lows_QK is not None:
                np.maximum(dropped_Q, lows_QK[:, 0], out=dropped_Q)
                # exact scores for approximate ones; what bounded the k-th score still does
                np.maximum(best.scores_QK[:, ::-1], lows_QK[:, :1], out=lows_QK)
        if len(crowded_q):
            self._search_again(crowded_q, start, stop)
        self.above_before_Q = block.above_Q.copy()

    def _merge(self, rows_P: np.ndarray, columns_P: np.ndarray, values_P: np.ndarray, scores_P: np.ndarray) -> None:
        block, ids_P = self.block, self.segment.ids_S[columns_P]
        if block.plain is not None:
            block.plain.add(rows_P, scores_P, ids_P)
        if block.under is not None and block.ceiling_Q is not None:
            below_P = scores_P < block.ceiling_Q[rows_P]
            block.under.add(rows_P[below_P], scores_P[below_P], ids_P[below_P])
            if block.count_above:
                counted_P = ~below_P & (values_P <= self.over_Q[rows_P])
                block.above_Q += np.bincount(rows_P[counted_P], minlength=len(block.above_Q))

    def _within_limit(self, needed: np.ndarray, rows_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The proposals that are rescored, and the queries whose band of doubt has more than the limit."""
        block = self.block
        if block.precision == "fp32":
            return needed, np.empty(0, dtype=np.int64)
        factor, extra = _LIMIT
        limit = factor * max(best.k for best in (block.plain, block.under) if best is not None) + extra
        crowded_q = np.flatnonzero(np.bincount(rows_P[needed], minlength=len(block.query_QD)) > limit)
        return (needed[~np.isin(rows_P[needed], crowded_q)] if len(crowded_q) else needed), crowded_q

    def _search_again(self, crowded_q: np.ndarray, start: int, stop: int) -> None:
        """The documents `start` to `stop` of the segment for some queries, with fp32 products."""
        block, part = self.block, slice(start, stop)
        again = QueryBlock(
            block.query_QD[crowded_q],
            plain=0 if block.plain is None else block.plain.k,
            under=0 if block.under is None else block.under.k,
            ceiling_Q=None if block.ceiling_Q is None else block.ceiling_Q[crowded_q],
            count_above=block.count_above,
            device=block.device,
            id_type=self.segment.ids_S.dtype,
        )
        lists = [(block.plain, again.plain), (block.under, again.under)]
        for best, other in lists:
            if best is not None and other is not None:
                other.scores_QK, other.ids_QK = best.scores_QK[crowded_q], best.ids_QK[crowded_q]
        again.add(Segment(self.segment.ids_S[part], self.segment.vectors.matrix_ND[part], "fp32", block.device))
        for best, other in lists:
            if best is not None and other is not None:
                best.scores_QK[crowded_q], best.ids_QK[crowded_q] = other.scores_QK, other.ids_QK
        block.above_Q[crowded_q] = (
            self.above_before_Q[crowded_q] + again.above_Q
        )  # the count of the bf16 pass is dropped
        for mine_Q, theirs_q in ((block.dropped_Q, again.dropped_Q), (block.dropped_under_Q, again.dropped_under_Q)):
            mine_Q[crowded_q] = np.maximum(mine_Q[crowded_q], theirs_q)
        block.again_Q[crowded_q] = True


def _raise(lows_QK: np.ndarray, rows_P: np.ndarray, low_P: np.ndarray) -> np.ndarray:
    """The k largest of each query's bounds and the new ones, the k-th first. `rows_P` ascends."""
    better_P = low_P > lows_QK[rows_P, 0]
    rows_P, low_P = rows_P[better_P], low_P[better_P]
    if len(rows_P) == 0:
        return lows_QK
    queries, k = lows_QK.shape
    place_P = np.arange(len(rows_P)) - np.searchsorted(rows_P, np.arange(queries))[rows_P]
    step = 2 * k + 32
    for start in range(0, int(place_P.max()) + 1, step):
        chosen_P = (place_P >= start) & (place_P < start + step)
        rows, place = rows_P[chosen_P], place_P[chosen_P] - start
        wide = np.full((queries, k + int(place.max()) + 1), -np.inf)
        wide[:, :k] = lows_QK
        wide[rows, k + place] = low_P[chosen_P]
        cut = wide.shape[1] - k
        lows_QK = np.partition(wide, cut, axis=1)[:, cut:]
    return lows_QK
