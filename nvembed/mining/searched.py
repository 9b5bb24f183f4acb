"""What a search left of each query's ranking, and what a rule can decide by it.

Stored are the plain best `depth`, the number of documents at or above the ceiling that was searched, and the best
`depth` below it. Together they are the ranking with at most one gap, between the end of the plain list and the ceiling.
Another rule can be applied without searching again as long as it never has to know what is in the gap, nor behind the
end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from nvembed.data.tables import SCORED_IDS
from nvembed.mining.lists import Lists, flat, joined, list_array, scored_array, starts
from nvembed.mining.rules import Limits
from nvembed.retrieval.exact.search import Found
from nvembed.retrieval.exact.topk import Best, tree_merge
from nvembed.types import UserError

SEARCHED_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("positives", SCORED_IDS, nullable=False),
        pa.field("ceiling", pa.float64(), nullable=False),
        pa.field("above", pa.int64(), nullable=False),
        pa.field("plain", SCORED_IDS, nullable=False),
        pa.field("under", SCORED_IDS, nullable=False),
    ]
)
FOUND_SCHEMA = pa.schema([("above", pa.int64()), ("plain", SCORED_IDS), ("under", SCORED_IDS)])
# A part of the corpus also tells the text hashes of what it found, and of the queries' `never` documents that it holds:
# whoever selects then needs nothing else of the corpus.
_HASHES = ("plain_hashes", "under_hashes", "never_hashes")
PART_SCHEMA = pa.schema([*FOUND_SCHEMA, *((name, pa.list_(pa.int64())) for name in _HASHES)])


class NeedsSearchError(UserError):
    """A rule has to know documents that were not searched for."""


@dataclass(frozen=True)
class Ranking:
    """Candidates of a query, best first, as far as they are known.

    Attributes:
        ids, scores, ranks: C each; ranks are 1-based places among all documents.
        gap: ranks (first, last) that are missing in between; None when nothing is.
        gap_floor: every document of the gap scores at least this.
        whole: whether nothing is missing behind the last candidate.
    """

    ids: Sequence[str]
    scores: Sequence[float]
    ranks: Sequence[int]
    gap: tuple[int, int] | None
    gap_floor: float
    whole: bool

    def check(self, limits: Limits, ceiling: float, enough: bool, decided: int, who: str) -> None:
        """Refuse a selection that depends on what was not searched.

        Args:
            ceiling: the rule's, of this query.
            enough: whether as many were kept as were wanted.
            decided: candidates the selection examined.
            who: the query, for the message.

        Raises:
            NeedsSearchError: naming what would have to be searched.
        """
        last = math.inf if limits.last is None else limits.last
        if self.gap is not None:
            first, end = self.gap
            passed = not enough or (decided > 0 and self.ranks[decided - 1] > first)
            if passed and ceiling > self.gap_floor and limits.first <= end and first <= last:
                raise NeedsSearchError(
                    f"{who}: the rule asks about ranks {first} to {end} (scores from {self.gap_floor:.4f} up), which "
                    f"were not searched. Search to depth {end}, or with a rule whose ceiling is {ceiling:.4f} or more."
                )
        end = self.ranks[-1] if len(self.ranks) else 0
        if not enough and not self.whole and end < last:
            raise NeedsSearchError(f"{who}: the rule asks about ranks behind {end}, which were not searched.")


def ranking(row: dict[str, object], depth: int) -> Ranking:
    """The known ranking of a stored row (`SEARCHED_SCHEMA`) that was searched to `depth` in both lists."""
    plain, under = ([(item["id"], item["score"]) for item in row[name]] for name in ("plain", "under"))  # type: ignore[attr-defined]
    above, ceiling = int(row["above"]), float(row["ceiling"])  # type: ignore[call-overload, arg-type]
    ranks = list(range(1, len(plain) + 1))
    whole = len(plain) < depth
    gap, floor = None, math.inf
    if not whole and math.isfinite(ceiling):
        known = max(len(plain) - above, 0)
        if above > len(plain):
            gap, floor = (len(plain) + 1, above), ceiling
        whole = len(under) < depth
        plain, ranks = plain + under[known:], ranks + [above + place + 1 for place in range(known, len(under))]
    return Ranking([key for key, _ in plain], [score for _, score in plain], ranks, gap, floor, whole)


def found_table(found: Found) -> pa.Table:
    """One task's part of the search as a table (`FOUND_SCHEMA`), a row per query."""
    rows = {
        "above": pa.array(found.above_Q, pa.int64()),
        "plain": scored_lists(found.plain, len(found.above_Q)),
        "under": scored_lists(found.under, len(found.above_Q)),
    }
    return pa.table(rows, schema=FOUND_SCHEMA)


def scored_lists(best: Best | None, queries: int) -> pa.Array:
    """The lists as Arrow, without a Python object per score."""
    if best is None:
        return pa.array([[]] * queries, SCORED_IDS)
    real_QK = np.isfinite(best.scores_QK)
    ids, scores = pa.array(best.ids_QK[real_QK], pa.string()), pa.array(best.scores_QK[real_QK], pa.float64())
    return scored_array(starts(real_QK.sum(axis=1)), ids, scores)


def merged(parts: Iterable[pa.Table], depth: int) -> pa.Table:
    """The parts of one query group, pairwise into the whole (`PART_SCHEMA`); few of them are in memory at a time."""
    whole = tree_merge(parts, lambda left, right: _merge(left, right, depth))
    assert whole is not None
    return whole


def _merge(left: pa.Table, right: pa.Table, depth: int) -> pa.Table:
    above_Q = left.column("above").to_numpy() + right.column("above").to_numpy()
    columns: dict[str, pa.Array] = {"above": pa.array(above_Q)}
    for name in ("plain", "under"):
        ours, theirs = (Lists.read(part.column(name), part.column(f"{name}_hashes")) for part in (left, right))
        columns[name], columns[f"{name}_hashes"] = ours.merge(theirs, depth).columns()
    never = (_hash_lists(part.column("never_hashes")) for part in (left, right))
    start_Q, hash_P = joined(*never)
    columns["never_hashes"] = list_array(start_Q, pa.array(hash_P))
    return pa.table(columns, schema=PART_SCHEMA)


def _hash_lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    start_Q, values = flat(column)
    return start_Q, np.asarray(values)
