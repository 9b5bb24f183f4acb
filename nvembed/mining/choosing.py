"""The selecting half of a mining actor: what of a group's rankings becomes negatives.

Several retrievers (lanes) each give their own choice, by the rule on their own scale; the choices are merged by rank,
one retriever's best after another's, texts that were taken already passed over.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from nvembed.data.tables import SCORED_IDS
from nvembed.mining.blocks import CODE, KEPT, Problem, choose
from nvembed.mining.checks import Candidates, Checks
from nvembed.mining.config import MineConfig, RandomNegatives, SampledTopK
from nvembed.mining.lists import flat, interleaved, owners, starts
from nvembed.mining.rules import Limits, drawn, rule_limits
from nvembed.mining.search import Searcher
from nvembed.mining.searched import NeedsSearchError, Ranking, ranking
from nvembed.mining.selection import Selection, select_negatives
from nvembed.retrieval.config import ExactIndex

_AT_ONCE = 512  # queries whose candidates' texts or second vectors are in memory together


@dataclass(frozen=True)
class Choice:
    """What was decided about one query: kept (id, score), best first, and the plain list's decisions for the audit."""

    kept: list[tuple[str, float]]
    plain: Selection


@dataclass(frozen=True)
class Choices:
    """What was decided about a group of queries.

    Attributes:
        code_P: int8, of every candidate of the first retriever's plain lists; see `blocks.Chosen`.
        plain_Q: int64, how many of each plain list were kept.
        kept: lists of `SCORED_IDS`, best first.
    """

    code_P: np.ndarray
    plain_Q: np.ndarray
    kept: pa.ListArray


def choices(
    searcher: Searcher, task: dict[str, Any], queries: pa.Table, lanes: Sequence[pa.Table], problem: Problem
) -> Choices:
    """Choices for a group, over whole arrays where nothing but ids, scores and text hashes has a say.

    Args:
        queries: its rows (`search.QUERY_COLUMNS`).
        lanes: each retriever's rows (`SEARCHED_SCHEMA` with the hashes of `PART_SCHEMA`), the first retriever's first.
        problem: the first retriever's as arrays.

    Raises:
        NeedsSearchError: more would have to be searched than an earlier step did.
    """
    config = searcher.config
    if len(lanes) > 1 or config.near_duplicate is not None or config.candidate_filter is not None:
        candidates = Candidates.of_group(searcher, task, queries, lanes)
        return _as_arrays([*_one_by_one(searcher, task, lanes, candidates)], problem.plain.start_Q)
    assert not isinstance(config.rule, RandomNegatives)
    rule, searched = config.rule, lanes[0]
    limits = rule_limits(rule, searcher.lowest(searched.column("positives")))
    wanted = wanted_of(config)
    enough = rule.top if isinstance(rule, SampledTopK) else config.num_negatives
    chosen = choose(problem, limits, wanted, enough, capped=config.max_per_document is not None)
    owner_K, at_K = chosen.owner_K, chosen.at_K
    needs = np.flatnonzero(chosen.needs_Q)
    if task["way"] == "reuse" or isinstance(config.search.index, ExactIndex):
        sure_K = ~chosen.needs_Q[owner_K]
        owner_K, at_K = owner_K[sure_K], at_K[sure_K]
    else:  # an approximate index: what it found is all there is
        needs = needs[:0]
    kept = problem.scored(at_K)
    if isinstance(rule, SampledTopK):
        owner_K, kept = _drawn_of_all(config, rule, task["dataset"], queries, owner_K, kept)
    sides = [(owner_K, *kept), *_deepened(searcher, task, queries, searched, needs)]
    return Choices(chosen.code_P, chosen.plain_Q, interleaved(sides, queries.num_rows))


def _one_by_one(
    searcher: Searcher, task: dict[str, Any], lanes: Sequence[pa.Table], candidates: Candidates | None
) -> Iterator[Choice]:
    """Choices of a group, few queries in memory at a time."""
    rows = searcher.query_rows(task)
    for start in range(0, len(rows), _AT_ONCE):
        few = rows[start : start + _AT_ONCE]
        known = [table.slice(start, len(few)) for table in lanes]
        yield from Chooser(searcher, task, few, known, np.arange(start, start + len(few)), candidates).run()


def wanted_of(config: MineConfig) -> int:
    """Candidates to keep of a query; with a cap, queries that lose a document need others: all that qualify."""
    if isinstance(config.rule, SampledTopK):
        return config.rule.top
    return config.num_negatives if config.max_per_document is None else config.depth


def _deepened(
    searcher: Searcher, task: dict[str, Any], queries: pa.Table, searched: pa.Table, needs: np.ndarray
) -> Iterator[tuple[np.ndarray, pa.Array, pa.Array]]:
    """(owner, ids, scores) of what is kept for queries whose searched lists were too short, one by one."""
    for start in range(0, len(needs), _AT_ONCE):
        rows = needs[start : start + _AT_ONCE]
        few = queries.take(pa.array(rows)).to_pylist()
        chooser = Chooser(searcher, task, few, [searched.take(pa.array(rows))], rows)
        kept = [choice.kept for choice in chooser.run()]
        start_Q = starts(np.array([len(items) for items in kept]))
        ids = pa.array([key for items in kept for key, _ in items], pa.string())
        scores = pa.array([score for items in kept for _, score in items], pa.float64())
        yield rows[owners(start_Q)], ids, scores


def _drawn_of_all(
    config: MineConfig,
    rule: SampledTopK,
    dataset: str,
    queries: pa.Table,
    owner_K: np.ndarray,
    kept: tuple[pa.Array, pa.Array],
) -> tuple[np.ndarray, tuple[pa.Array, pa.Array]]:
    """The draw from every query's pool."""
    names = queries.column("key").to_pylist()
    key_Q = np.array([_query_key(config, dataset, name) for name in names], dtype=np.uint64)
    start_Q = starts(np.bincount(owner_K, minlength=len(names)))
    column_K = np.arange(len(owner_K)) - start_Q[owner_K]
    shape = len(names), rule.top
    allowed_QT, score_QT = np.zeros(shape, dtype=bool), np.zeros(shape)
    key_QT, at_QT = np.zeros(shape, dtype=np.uint64), np.zeros(shape, dtype=np.int64)
    allowed_QT[owner_K, column_K] = True
    score_QT[owner_K, column_K] = np.asarray(kept[1])
    key_QT[owner_K, column_K] = [_document_key(key) for key in kept[0].to_pylist()]
    at_QT[owner_K, column_K] = np.arange(len(owner_K))
    column_QK = drawn(allowed_QT, score_QT, config.num_negatives, rule, key_Q, key_QT)
    row, place = np.nonzero(column_QK >= 0)
    at = pa.array(at_QT[row, column_QK[row, place]])
    return row, (kept[0].take(at), kept[1].take(at))


def _query_key(config: MineConfig, dataset: str, key: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{config.seed}\0{dataset}\0{key}".encode())


def _document_key(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode())


def _as_arrays(chosen: Sequence[Choice], start_Q: np.ndarray) -> Choices:
    """Choices of single queries as those of a group."""
    code_P = np.zeros(int(start_Q[-1]), dtype=np.int8)
    for start, choice in zip(start_Q, chosen, strict=False):
        code_P[start + np.array(choice.plain.kept, dtype=np.int64)] = KEPT
        for place, reason in choice.plain.rejected.items():
            code_P[start + place] = CODE[reason]
    rows = [[{"id": key, "score": score} for key, score in choice.kept] for choice in chosen]
    plain_Q = np.array([len(choice.plain.kept) for choice in chosen], dtype=np.int64)
    return Choices(code_P, plain_Q, pa.array(rows, SCORED_IDS))


class Chooser:
    """Selection for queries one by one: what `blocks.choose` is held to, and where a check reads texts or asks a model.

    Args:
        searcher: reads texts and vectors; searches deeper where too few are left.
        task: the group.
        queries: its rows.
        lanes: see `choices`.
        rows: the queries' places in the group, where they are some of it.
        candidates: what the checks read of the documents in `lanes`; None where nothing is checked.
    """

    def __init__(
        self,
        searcher: Searcher,
        task: dict[str, Any],
        queries: list[dict[str, Any]],
        lanes: Sequence[pa.Table],
        rows: np.ndarray | None = None,
        candidates: Candidates | None = None,
    ) -> None:
        self._config, self._searcher, self._task = searcher.config, searcher, task
        self._queries, self._lanes = queries, [table.to_pylist() for table in lanes]
        self._never_hashes = lanes[0].column("never_hashes").to_pylist()
        self._hashes: dict[str, int] = {}
        for table, name in itertools.product(lanes, ("plain", "under")):
            ids, digests = flat(table.column(name))[1].field("id"), flat(table.column(f"{name}_hashes"))[1]
            self._hashes.update(zip(ids.to_pylist(), digests.to_pylist(), strict=True))
        self._deepen = task["way"] == "search" and isinstance(self._config.search.index, ExactIndex)
        self._rows = np.arange(len(queries)) if rows is None else rows
        self._candidates = candidates
        assert not isinstance(self._config.rule, RandomNegatives)
        self._rule = self._config.rule
        self._limits = [self._lane_limits(found) for found in self._lanes]
        self._count = self._config.num_negatives if self._config.max_per_document is None else self._config.depth

    def _lane_limits(self, rows: list[dict[str, Any]]) -> Limits:
        lowest_Q = np.array([min(item["score"] for item in row["positives"]) for row in rows])
        return rule_limits(self._rule, lowest_Q)

    def run(self) -> list[Choice]:
        """A choice for every query, in order."""
        depth, block = self._config.depth, range(len(self._queries))
        rankings = [{index: ranking(rows[index], depth) for index in block} for rows in self._lanes]
        checks = self._checks(rankings, self._candidates)
        chosen: dict[int, list[tuple[str, float]]] = {}
        plain: dict[int, Selection] = {}
        short = []
        for index in block:
            first = rankings[0][index]
            top = len(self._lanes[0][index]["plain"])
            plain[index] = self._first(0, index, replace_length(first, top), None)
            try:
                chosen[index] = self._choose(0, index, first, checks)
            except NeedsSearchError:
                if not self._deepen and self._task["way"] == "reuse":
                    raise
                short.append(index)
        chosen |= self._deeper(short, rankings[0])
        if len(self._lanes) > 1:
            for index in block:
                others = [
                    self._choose(lane, index, rankings[lane][index], checks, lenient=True)
                    for lane in range(1, len(self._lanes))
                ]
                chosen[index] = self._merged([chosen[index], *others])
        return [Choice(chosen[index], plain[index]) for index in block]

    def _deeper(self, short: list[int], known: Mapping[int, Ranking]) -> dict[int, list[tuple[str, float]]]:
        """Choices for queries whose searched lists were too short, from ever deeper ones."""
        chosen, depth = {}, self._config.depth
        if not self._deepen:
            checks = self._checks([{index: known[index] for index in short}], self._candidates)
            return {index: self._choose(0, index, known[index], checks, lenient=True) for index in short}
        if short:
            query_QD = self._searcher.query_vectors(self._task, 0)
        while short:
            depth = min(4 * depth, self._task["corpus"] + 1)  # one more than there are: then nothing is missing
            ceiling_q = self._limits[0].ceiling_Q[short]
            rows = self._searcher.deeper(self._task, query_QD[self._rows[short]], ceiling_q, depth).to_pylist()
            found = {
                index: ranking({**row, "ceiling": float(ceiling)}, depth)
                for index, row, ceiling in zip(short, rows, ceiling_q, strict=True)
            }
            wanted = {key for known_now in found.values() for key in known_now.ids}
            self._read_hashes(wanted)
            candidates = None
            if self._candidates is not None:
                wanted |= {key for index in found for key in self._queries[index]["positives"]}
                candidates = Candidates(self._searcher, self._task, pa.array(sorted(wanted), pa.string()))
            checks = self._checks([found], candidates)
            left = []
            for index, known_now in found.items():
                try:
                    chosen[index] = self._choose(0, index, known_now, checks)
                except NeedsSearchError:
                    left.append(index)
            short = left
        return chosen

    def _checks(self, rankings: Sequence[Mapping[int, Ranking]], candidates: Candidates | None) -> Checks | None:
        return Checks.build(self._config, candidates, self._queries, self._rows, rankings)

    def _read_hashes(self, wanted: set[str]) -> None:
        missing = sorted(wanted - self._hashes.keys())
        digest_N, found_N = self._searcher.hashes_of(self._task["dataset"], pa.array(missing, pa.string()))
        assert found_N.all(), "a document was found that has no text"
        self._hashes.update(zip(missing, digest_N.tolist(), strict=True))

    def _first(self, lane: int, index: int, known: Ranking, checks: Checks | None) -> Selection:
        """The first candidates the rule allows."""
        query, hashes, limits = self._queries[index], self._hashes, self._limits[lane]
        sampled = self._rule.top if isinstance(self._rule, SampledTopK) else None
        return select_negatives(
            known.ids,
            known.scores,
            [hashes[key] for key in known.ids],
            below=float(limits.ceiling_Q[index]),
            never_ids=set(query["never"]),
            never_hashes={query["hash"], *self._never_hashes[index]},
            count=sampled or self._count,
            ranks=(limits.first, limits.last),
            rank_of=known.ranks,
            refuse=None if checks is None else checks.of(index, known.ids),
        )

    def _choose(
        self, lane: int, index: int, known: Ranking, checks: Checks | None, *, lenient: bool = False
    ) -> list[tuple[str, float]]:
        """Kept (id, score).

        Raises:
            NeedsSearchError: too few are left of what was searched, unless `lenient`.
        """
        picked = self._first(lane, index, known, checks)
        limits = self._limits[lane]
        if not lenient:
            decided = len(picked.kept) + len(picked.rejected)
            enough = self._rule.top if isinstance(self._rule, SampledTopK) else self._config.num_negatives
            if len(picked.kept) < enough or self._config.max_per_document is None:
                who = f"example {self._queries[index]['key']!r}"
                known.check(limits, float(limits.ceiling_Q[index]), len(picked.kept) >= enough, decided, who)
        kept = picked.kept
        if isinstance(self._rule, SampledTopK):
            kept = self._drawn(index, known, kept, self._rule)
        return [(known.ids[place], float(known.scores[place])) for place in kept]

    def _drawn(self, index: int, known: Ranking, pool: list[int], rule: SampledTopK) -> list[int]:
        if not pool:
            return []
        keys = np.array([[_document_key(known.ids[place]) for place in pool]], dtype=np.uint64)
        scores = np.array([[known.scores[place] for place in pool]], dtype=np.float64).reshape(1, -1)
        query = self._queries[index]["key"]
        query_key = np.array([_query_key(self._config, self._task["dataset"], query)], dtype=np.uint64)
        allowed = np.ones(scores.shape, dtype=bool)
        columns = drawn(allowed, scores, self._config.num_negatives, rule, query_key, keys.reshape(1, -1))
        return [pool[column] for column in columns[0] if column >= 0]

    def _merged(self, kept: Sequence[list[tuple[str, float]]]) -> list[tuple[str, float]]:
        """Each retriever's best in turn, every text once."""
        seen: set[int] = set()
        out: list[tuple[str, float]] = []
        for item in itertools.chain.from_iterable(itertools.zip_longest(*kept)):
            if item is not None and self._hashes[item[0]] not in seen and len(out) < self._count:
                seen.add(self._hashes[item[0]])
                out.append(item)
        return out


def replace_length(known: Ranking, length: int) -> Ranking:
    """The first candidates of a ranking."""
    return replace(known, ids=known.ids[:length], scores=known.scores[:length], ranks=known.ranks[:length])
