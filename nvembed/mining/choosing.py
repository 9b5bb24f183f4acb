"""The selecting half of a mining actor: what of a group's rankings becomes negatives.

Several miners (lanes) each give their own choice, by the rule on their own scale; the choices are merged rank by rank,
one miner's best after another's, texts that were taken already passed over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from nvembed import storage
from nvembed.mining.config import MineConfig, RandomNegatives, SampledTopK
from nvembed.mining.rules import Limits, drawn, rule_limits
from nvembed.mining.searched import NeedsSearchError, Ranking, ranking
from nvembed.mining.searching import Searcher
from nvembed.mining.selection import Reason, Selection, jaccard, select_negatives, word_triples
from nvembed.retrieval.config import ExactIndex
from nvembed.retrieval.shards import list_shards, read_table

_AT_ONCE = 512  # queries whose candidates' texts or second vectors are in memory together


@dataclass(frozen=True)
class Choice:
    """What was decided about one query: kept (id, score), best first, and the plain list's decisions for the audit."""

    kept: list[tuple[str, float]]
    plain: Selection


class Chooser:
    """Selection for one group of queries.

    Args:
        searcher: reads texts and vectors; searches deeper where too few are left.
        task: the group.
        queries: its rows.
        lanes: each miner's rows (`SEARCHED_SCHEMA`), the first miner's first.
        hashes: text hash by document id.
        deepen: whether more may be searched; what is needed is refused otherwise.
    """

    def __init__(
        self,
        searcher: Searcher,
        task: dict[str, Any],
        queries: list[dict[str, Any]],
        lanes: Sequence[list[dict[str, Any]]],
        hashes: dict[str, int],
        *,
        deepen: bool,
    ) -> None:
        self._config, self._searcher, self._task = searcher.config, searcher, task
        self._queries, self._lanes, self._hashes = queries, lanes, hashes
        self._deepen = deepen and isinstance(self._config.search.index, ExactIndex)
        assert not isinstance(self._config.rule, RandomNegatives)
        self._rule = self._config.rule
        self._limits = [self._lane_limits(rows) for rows in lanes]
        # with a cap, queries that lose a document need others: keep all that qualify
        self._count = self._config.num_negatives if self._config.max_per_document is None else self._config.depth

    def _lane_limits(self, rows: list[dict[str, Any]]) -> Limits:
        lowest_Q = np.array([min(item["score"] for item in row["positives"]) for row in rows])
        return rule_limits(self._rule, lowest_Q)

    def run(self) -> list[Choice]:
        """A choice for every query, in order."""
        choices: list[Choice] = []
        for start in range(0, len(self._queries), _AT_ONCE):
            choices += self._block(range(start, min(start + _AT_ONCE, len(self._queries))))
        return choices

    def _block(self, block: range) -> list[Choice]:
        depth = self._config.depth
        rankings = [{index: ranking(rows[index], depth) for index in block} for rows in self._lanes]
        checks = Checks.build(self._searcher, self._task, self._queries, rankings)
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
            checks = Checks.build(self._searcher, self._task, self._queries, [{index: known[index] for index in short}])
            return {index: self._choose(0, index, known[index], checks, lenient=True) for index in short}
        if short:
            query_QD = self._searcher.query_vectors(self._task, 0)
        while short:
            depth = min(4 * depth, self._task["corpus"] + 1)  # one more than there are: then nothing is missing
            ceiling_q = self._limits[0].ceiling_Q[short]
            rows = self._searcher.deeper(self._task, query_QD[short], ceiling_q, depth).to_pylist()
            found = {
                index: ranking({**row, "ceiling": float(ceiling)}, depth)
                for index, row, ceiling in zip(short, rows, ceiling_q, strict=True)
            }
            missing = {key for known_now in found.values() for key in known_now.ids} - self._hashes.keys()
            self._hashes.update(read_hashes(self._searcher, self._task["dataset"], missing))
            checks = Checks.build(self._searcher, self._task, self._queries, [found])
            left = []
            for index, known_now in found.items():
                try:
                    chosen[index] = self._choose(0, index, known_now, checks)
                except NeedsSearchError:
                    left.append(index)
            short = left
        return chosen

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
            never_hashes={query["hash"], *(hashes[key] for key in query["never"] if key in hashes)},
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
        config, dataset = self._config, self._task["dataset"]
        query = f"{config.seed}\0{dataset}\0{self._queries[index]['key']}"
        keys = np.array([[xxhash.xxh3_64_intdigest(known.ids[place].encode()) for place in pool]], dtype=np.uint64)
        scores = np.array([[known.scores[place] for place in pool]], dtype=np.float64).reshape(1, -1)
        query_key = np.array([xxhash.xxh3_64_intdigest(query.encode())], dtype=np.uint64)
        allowed = np.ones(scores.shape, dtype=bool)
        columns = drawn(allowed, scores, config.num_negatives, rule, query_key, keys.reshape(1, -1))
        return [pool[column] for column in columns[0] if column >= 0]

    def _merged(self, kept: Sequence[list[tuple[str, float]]]) -> list[tuple[str, float]]:
        """Each miner's best in turn, every text once."""
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


def read_hashes(searcher: Searcher, dataset: str, wanted: set[str]) -> dict[str, int]:
    """Text hashes of the named documents only: one pass over two columns instead of a map of the corpus."""
    if not wanted:
        return {}
    return dict(_columns(searcher, dataset, wanted, "hash"))


def _columns(searcher: Searcher, dataset: str, wanted: set[str], column: str) -> list[tuple[str, Any]]:
    root = storage.join(searcher.paths.texts, dataset, "documents")
    values = pa.array(sorted(wanted), pa.string())
    found: list[tuple[str, Any]] = []
    for name in list_shards(root):
        table = read_table(storage.join(root, name), ["key", column])
        table = table.filter(pc.is_in(table.column("key"), value_set=values))
        found += zip(table.column("key").to_pylist(), table.column(column).to_pylist(), strict=True)
    return found


def judged_scores(
    searcher: Searcher, task: dict[str, Any], queries: list[dict[str, Any]], ids: Sequence[Sequence[str]]
) -> list[dict[str, float]]:
    """The judge's score of chosen documents of each query, by id."""
    judge = searcher.cross_encoder()
    if judge is None:
        return searcher.scores_of(task, queries, "judge", ids)
    texts = dict(_columns(searcher, task["dataset"], {key for keys in ids for key in keys}, "text"))
    model = searcher.config.cross_encoder
    found: list[dict[str, float]] = []
    for query, keys in zip(queries, ids, strict=True):
        before = query["instruction"] if model is not None and model.instruction else ""
        scores = judge.scores(before + query["text"], [texts[key] for key in keys])
        found.append({key: float(score) for key, score in zip(keys, scores, strict=True)})
    return found


class Checks:
    """The costly checks of some queries' candidates: near copies of a positive, and the judge."""

    def __init__(self, config: MineConfig) -> None:
        self._config = config
        self._triples: dict[str, frozenset[int]] = {}
        self._texts: dict[str, str] = {}
        self._positives: dict[int, list[str]] = {}
        self._judged: dict[int, dict[str, float]] = {}
        self._judge_ceiling: dict[int, float] = {}

    @classmethod
    def build(
        cls,
        searcher: Searcher,
        task: dict[str, Any],
        queries: list[dict[str, Any]],
        rankings: Sequence[Mapping[int, Ranking]],
    ) -> Checks | None:
        """Read what the recipe's checks need; None when it has none."""
        config = searcher.config
        if config.near_duplicate is None and config.judge is None:
            return None
        checks = cls(config)
        indices = sorted(rankings[0])
        candidates = {index: {key for lane in rankings for key in lane[index].ids} for index in indices}
        checks._positives = {index: queries[index]["positives"] for index in indices}
        if config.near_duplicate is not None:
            wanted = {key for index in indices for key in (*candidates[index], *checks._positives[index])}
            checks._texts = dict(_columns(searcher, task["dataset"], wanted, "text"))
        if config.judge is not None:
            ids: list[list[str]] = [[] for _ in queries]
            for index in indices:
                ids[index] = [*checks._positives[index], *sorted(candidates[index] - set(checks._positives[index]))]
            scores = judged_scores(searcher, task, queries, ids)
            for index in indices:
                found = scores[index]
                positives = {key: found[key] for key in checks._positives[index]}
                checks._judged[index] = found
                checks._judge_ceiling[index] = float(searcher.ceiling([positives], config.judge.ceiling)[0])
        return checks

    def of(self, index: int, ids: Sequence[str]) -> Callable[[int], Reason | None]:
        """What refuses the candidates of one query, by their place in `ids`."""

        def refuse(place: int) -> Reason | None:
            key = ids[place]
            if self._config.near_duplicate is not None and any(
                jaccard(self._of_text(key), self._of_text(positive)) >= self._config.near_duplicate
                for positive in self._positives[index]
            ):
                return Reason.NEAR_DUPLICATE
            if self._config.judge is not None and not self._judged[index][key] < self._judge_ceiling[index]:
                return Reason.JUDGED
            return None

        return refuse

    def _of_text(self, key: str) -> frozenset[int]:
        if key not in self._triples:
            self._triples[key] = word_triples(self._texts[key])
        return self._triples[key]
