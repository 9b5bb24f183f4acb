"""The costly checks of mining: near duplicates of a positive, and the judge, an embedder or a cross-encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core import storage
from nvembed.core.vectors import table_matrix
from nvembed.mining.config import MineConfig
from nvembed.mining.lists import flat
from nvembed.mining.picked import Picked
from nvembed.mining.rules import ceilings
from nvembed.mining.search import Searcher, scores_by_id
from nvembed.mining.searched import Ranking
from nvembed.mining.selection import Reason
from nvembed.text.identity import jaccard, word_triples


class Candidates:
    """What the checks read of the documents that some queries may take, and of their positives; read once.

    Args:
        task: the group of queries.
        ids: the documents.
    """

    def __init__(self, searcher: Searcher, task: dict[str, Any], ids: pa.Array) -> None:
        self._searcher, self._config = searcher, searcher.config
        roots = searcher.paths.texts, searcher.paths.lane_vectors("candidate_filter")
        texts, vectors = (storage.join(root, task["dataset"], "documents") for root in roots)
        needs_texts = self._config.near_duplicate is not None or self._config.cross_encoder is not None
        self._texts = Picked(texts, ids, ["text"]) if needs_texts else None
        self._vectors = self._query_QD = None
        if self._config.candidate_filter is not None and self._config.cross_encoder is None:
            self._vectors, self._query_QD = (
                Picked(vectors, ids, ["vector"]),
                searcher.query_vectors(task, "candidate_filter"),
            )

    @classmethod
    def of_group(
        cls, searcher: Searcher, task: dict[str, Any], queries: pa.Table, lanes: Sequence[pa.Table]
    ) -> Candidates | None:
        """Of all candidates of a group; None where the recipe has no check that reads them."""
        if searcher.config.near_duplicate is None and searcher.config.candidate_filter is None:
            return None
        lists = [table.column(name) for table in lanes for name in ("plain", "under")]
        ids = [flat(column)[1].field("id") for column in lists]
        return cls(searcher, task, pc.unique(pa.concat_arrays([*ids, flat(queries.column("positives"))[1]])))

    def texts(self, wanted: set[str]) -> dict[str, str]:
        """Texts of some of them."""
        table = self._texts.take(sorted(wanted)) if self._texts is not None else None
        if table is None:
            return {}
        return dict(zip(table.column("key").to_pylist(), table.column("text").to_pylist(), strict=True))

    def judged(
        self, queries: Sequence[dict[str, Any]], rows: np.ndarray, ids: Sequence[Sequence[str]]
    ) -> list[dict[str, float]]:
        """The judge's score of chosen documents of each query, by id; `rows`: the queries' places in the group."""
        wanted = {key for keys in ids for key in keys}
        if self._vectors is None:
            return self._read_together(queries, ids, self.texts(wanted))
        assert self._query_QD is not None
        table = self._vectors.take(sorted(wanted))
        place = {} if table is None else {key: row for row, key in enumerate(table.column("key").to_pylist())}
        vectors = np.empty((0, 1), dtype=np.float32) if table is None else table_matrix(table)
        return scores_by_id(queries, self._query_QD[rows], ids, place, vectors)

    def _read_together(
        self, queries: Sequence[dict[str, Any]], ids: Sequence[Sequence[str]], texts: dict[str, str]
    ) -> list[dict[str, float]]:
        """By a cross-encoder."""
        judge, model = self._searcher.cross_encoder(), self._config.cross_encoder
        assert judge is not None and model is not None
        found: list[dict[str, float]] = []
        for query, keys in zip(queries, ids, strict=True):
            before = query["instruction"] if model.instruction else ""
            scores = judge.scores(before + query["text"], [texts[key] for key in keys])
            found.append({key: float(score) for key, score in zip(keys, scores, strict=True)})
        return found


class Checks:
    """The costly checks of some queries' candidates: near duplicates of a positive, and the judge."""

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
        config: MineConfig,
        candidates: Candidates | None,
        queries: list[dict[str, Any]],
        rows: np.ndarray,
        rankings: Sequence[Mapping[int, Ranking]],
    ) -> Checks | None:
        """What the recipe's checks need of some queries; None when it has none.

        Args:
            candidates: holds at least the documents of the rankings.
            rows: the queries' places in their group.
        """
        if candidates is None:
            return None
        checks = cls(config)
        indices = sorted(rankings[0])
        ranked = {index: {key for lane in rankings for key in lane[index].ids} for index in indices}
        checks._positives = {index: queries[index]["positives"] for index in indices}
        if config.near_duplicate is not None:
            checks._texts = candidates.texts(
                {key for index in indices for key in (*ranked[index], *checks._positives[index])}
            )
        if config.candidate_filter is not None:
            ids: list[list[str]] = [[] for _ in queries]
            for index in indices:
                ids[index] = [*checks._positives[index], *sorted(ranked[index] - set(checks._positives[index]))]
            scores = candidates.judged(queries, rows, ids)
            for index in indices:
                found = scores[index]
                lowest = np.array([min(found[key] for key in checks._positives[index])])
                checks._judged[index] = found
                checks._judge_ceiling[index] = float(ceilings(config.candidate_filter.ceiling, lowest)[0])
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
            if self._config.candidate_filter is not None and not self._judged[index][key] < self._judge_ceiling[index]:
                return Reason.JUDGED
            return None

        return refuse

    def _of_text(self, key: str) -> frozenset[int]:
        if key not in self._triples:
            self._triples[key] = word_triples(self._texts[key])
        return self._triples[key]
