"""The costly checks of mining: near copies of a positive, and the judge, an embedder or a cross-encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed import storage
from nvembed.mining.config import MineConfig
from nvembed.mining.rules import ceilings
from nvembed.mining.searched import Ranking
from nvembed.mining.searching import Searcher
from nvembed.mining.selection import Reason, jaccard, word_triples
from nvembed.retrieval.shards import list_shards, read_table


def _texts(searcher: Searcher, dataset: str, wanted: set[str]) -> dict[str, str]:
    """Texts of the named documents."""
    root = storage.join(searcher.paths.texts, dataset, "documents")
    values = pa.array(sorted(wanted), pa.string())
    found: dict[str, str] = {}
    for name in list_shards(root):
        table = read_table(storage.join(root, name), ["key", "text"])
        table = table.filter(pc.is_in(table.column("key"), value_set=values))
        found.update(zip(table.column("key").to_pylist(), table.column("text").to_pylist(), strict=True))
    return found


def judged_scores(
    searcher: Searcher, task: dict[str, Any], queries: list[dict[str, Any]], ids: Sequence[Sequence[str]]
) -> list[dict[str, float]]:
    """The judge's score of chosen documents of each query, by id."""
    judge = searcher.cross_encoder()
    if judge is None:
        return searcher.scores_of(task, queries, "judge", ids)
    texts = _texts(searcher, task["dataset"], {key for keys in ids for key in keys})
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
            checks._texts = _texts(searcher, task["dataset"], wanted)
        if config.judge is not None:
            ids: list[list[str]] = [[] for _ in queries]
            for index in indices:
                ids[index] = [*checks._positives[index], *sorted(candidates[index] - set(checks._positives[index]))]
            scores = judged_scores(searcher, task, queries, ids)
            for index in indices:
                found = scores[index]
                lowest = np.array([min(found[key] for key in checks._positives[index])])
                checks._judged[index] = found
                checks._judge_ceiling[index] = float(ceilings(config.judge.ceiling, lowest)[0])
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
