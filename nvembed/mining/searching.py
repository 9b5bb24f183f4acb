"""The searching half of a mining actor: one group of queries against one part of the corpus, written to files.

Under `<work>/checkpoints/search/<dataset>/<group>/`: for every miner (a *lane*) `lane-0-positives.parquet`, the scores
of the group's positives, and `lane-0-part-00000.parquet`, ..., what each part of the corpus holds for the group. A file
that is there is complete; whoever writes the last one of a group goes on to select.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed import storage
from nvembed.data.tables import SCORED_IDS
from nvembed.mining.config import Bm25Miner, CeilingRule, MineConfig, RandomNegatives, SearchedRule
from nvembed.mining.rules import ceilings
from nvembed.mining.searched import PART_SCHEMA, merged, part_table
from nvembed.retrieval.bm25 import Bm25Index
from nvembed.retrieval.config import ExactIndex
from nvembed.retrieval.cross_encoder import CrossScorer
from nvembed.retrieval.search import Found, pair_scores, search_shards
from nvembed.retrieval.search_faiss import search_with_faiss
from nvembed.retrieval.shards import iter_vectors, list_shards, read_table, table_matrix, write_table


@dataclass(frozen=True)
class MinePaths:
    """Working directories of one `mine` step."""

    texts: str
    vectors: str
    search: str
    select: str

    @classmethod
    def under(cls, work_uri: str) -> MinePaths:
        """The layout below a step's `checkpoints/`."""
        root = storage.join(work_uri, "checkpoints")
        return cls(*(storage.join(root, name) for name in ("texts", "vectors", "search", "select")))

    def lane_vectors(self, lane: int | str) -> str:
        """Vectors of a lane; the first miner's lie where there was only one."""
        return self.vectors if lane == 0 else f"{self.vectors}_{lane}"


class Searcher:
    """Reads texts and vectors of a group, searches, and keeps what it found in files."""

    def __init__(self, config: MineConfig, paths: MinePaths) -> None:
        self.config, self.paths = config, paths
        self.lanes = 1 + len(config.more_miners)
        self.again = 0  # queries of which a part was searched again in fp32
        self._bm25: tuple[str, Bm25Index] | None = None
        self._cross: CrossScorer | None = None

    def cross_encoder(self) -> CrossScorer | None:
        """The judge, loaded when first asked for; None where there is none or it is an embedder."""
        if self._cross is None and self.config.cross_encoder is not None:
            self._cross = CrossScorer(self.config.cross_encoder, self.config.search.device)
        return self._cross

    # -- files --------------------------------------------------------------------------------------------------------

    def _file(self, task: dict[str, Any], lane: int, name: str) -> str:
        return storage.join(self.paths.search, task["dataset"], task["part"], f"lane-{lane}-{name}.parquet")

    def _segment_file(self, task: dict[str, Any], lane: int, segment: int) -> str:
        return self._file(task, lane, f"part-{segment:05d}")

    def left(self, task: dict[str, Any]) -> list[int]:
        """Parts of the corpus that were not searched yet for the task's group; one listing of its directory."""
        there = set(storage.list_directory(storage.join(self.paths.search, task["dataset"], task["part"])))
        wanted = {
            segment: {self._segment_file(task, lane, segment).rsplit("/", 1)[-1] for lane in range(self.lanes)}
            for segment in range(task["segments"])
        }
        return [segment for segment, names in wanted.items() if not names <= there]

    def query_rows(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        """The group's queries with what is known about them."""
        root = storage.join(self.paths.texts, task["dataset"], "queries")
        columns = ["key", "text", "instruction", "hash", "positives", "own", "never", "given"]
        return [row for name in task["shards"] for row in read_table(storage.join(root, name), columns).to_pylist()]

    def query_vectors(self, task: dict[str, Any], lane: int | str) -> np.ndarray:
        """float32 [Q, D] of the group."""
        root = storage.join(self.paths.lane_vectors(lane), task["dataset"], "queries")
        return np.concatenate([table_matrix(read_table(storage.join(root, name))) for name in task["shards"]])

    def document_vectors(
        self, dataset: str, lane: int | str = 0, names: list[str] | None = None
    ) -> Iterator[tuple[list[str], np.ndarray]]:
        """The corpus, or some shards of it, one shard in memory at a time."""
        return iter_vectors(storage.join(self.paths.lane_vectors(lane), dataset, "documents"), names)

    def vectors_of(self, dataset: str, wanted: set[str], lane: int | str) -> tuple[dict[str, int], np.ndarray]:
        """Row by id and vectors of the named documents; of the other shards only the ids are read."""
        root = storage.join(self.paths.lane_vectors(lane), dataset, "documents")
        values = pa.array(sorted(wanted), pa.string())
        keys: list[str] = []
        parts: list[np.ndarray] = []
        for name in list_shards(root):
            uri = storage.join(root, name)
            rows = pc.indices_nonzero(pc.is_in(read_table(uri, ["key"]).column("key"), value_set=values))
            if len(rows):
                table = read_table(uri, ["key", "vector"])
                keys += table.column("key").take(rows).to_pylist()
                parts.append(table_matrix(table)[rows.to_numpy()])
        matrix = np.concatenate(parts) if parts else np.empty((0, 1), dtype=np.float32)
        return {key: row for row, key in enumerate(keys)}, matrix

    # -- positives ----------------------------------------------------------------------------------------------------

    def positives(self, task: dict[str, Any], queries: list[dict[str, Any]], lane: int) -> list[dict[str, float]]:
        """Exact score of each query's positives, by id; read again when they were computed before.

        Raises:
            UserError: a positive is not in the corpus.
        """
        uri = self._file(task, lane, "positives")
        if storage.exists(uri):
            stored = read_table(uri).column("positives").to_pylist()
            return [{item["id"]: item["score"] for item in row} for row in stored]
        if self._is_bm25(lane):
            lists = self._bm25_search(task, queries, 1)[2]
            found = [
                dict(zip(row["positives"], scores, strict=True)) for row, scores in zip(queries, lists, strict=True)
            ]
        else:
            found = self.scores_of(task, queries, lane, [row["positives"] for row in queries])
        rows = [{"positives": [{"id": key, "score": score} for key, score in row.items()]} for row in found]
        write_table(pa.Table.from_pylist(rows, schema=pa.schema([("positives", SCORED_IDS)])), uri)
        return found

    def scores_of(
        self, task: dict[str, Any], queries: list[dict[str, Any]], lane: int | str, ids: Sequence[Sequence[str]]
    ) -> list[dict[str, float]]:
        """Exact scores of chosen documents of each query, by id."""
        query_QD = self.query_vectors(task, lane)
        rows, vectors = self.vectors_of(task["dataset"], {key for keys in ids for key in keys}, lane)
        pairs = [(index, key) for index, keys in enumerate(ids) for key in keys]
        for index, key in pairs:
            if key not in rows:
                raise storage.UserError(
                    f"example {queries[index]['key']!r} names {key!r} as its positive, which has no vector: it is "
                    "missing from the corpus of its data set (prepare it again), or the encoder rejected its text "
                    "(the log names what was rejected and why)."
                )
        found: list[dict[str, float]] = [{} for _ in queries]
        for start in range(0, len(pairs), 8192):
            block = pairs[start : start + 8192]
            left, right = query_QD[[index for index, _ in block]], vectors[[rows[key] for _, key in block]]
            for (index, key), value in zip(block, pair_scores(left, right), strict=True):
                found[index][key] = float(value)
        return found

    def lowest(self, positives: list[dict[str, float]]) -> np.ndarray:
        """float64 [Q], the lowest score among each query's positives."""
        return np.array([min(row.values()) for row in positives], dtype=np.float64)

    def ceiling(self, positives: list[dict[str, float]], rule: SearchedRule | CeilingRule | None = None) -> np.ndarray:
        """float64 [Q] of the recipe's rule."""
        assert not isinstance(self.config.rule, RandomNegatives)
        return ceilings(rule or self.config.rule, self.lowest(positives))

    # -- search -------------------------------------------------------------------------------------------------------

    def search_segment(self, task: dict[str, Any], queries: list[dict[str, Any]]) -> None:
        """Search the task's part of the corpus with every miner that has not done so."""
        for lane in range(self.lanes):
            uri = self._segment_file(task, lane, task["segment"])
            if storage.exists(uri):
                continue
            ceiling_Q = self.ceiling(self.positives(task, queries, lane))
            if self._is_bm25(lane):
                table = self._bm25_part(task, queries, ceiling_Q)
            else:
                found = self._search(task, lane, ceiling_Q)
                self.again += found.again
                table = part_table(found)
            write_table(table, uri)

    def _search(self, task: dict[str, Any], lane: int, ceiling_Q: np.ndarray) -> Found:
        config, search = self.config, self.config.search
        under = config.depth if np.isfinite(ceiling_Q).any() else 0
        query_QD = self.query_vectors(task, lane)
        shards = self.document_vectors(task["dataset"], lane, task["documents"])
        if isinstance(search.index, ExactIndex):
            return search_shards(
                query_QD,
                shards,
                plain=config.depth,
                under=under,
                ceiling_Q=ceiling_Q,
                count_above=True,
                precision=search.precision,
                device=search.device,
                tile=search.block_documents,
            )
        parts = list(shards)
        ids_N = np.array([key for keys, _ in parts for key in keys], dtype=object)
        matrix_ND = np.concatenate([part for _, part in parts])
        return search_with_faiss(
            search.index,
            query_QD,
            ids_N,
            matrix_ND,
            plain=config.depth,
            under=under,
            ceiling_Q=ceiling_Q,
            threads=config.encode.threads_per_actor,
        )

    def deeper(self, task: dict[str, Any], query_qD: np.ndarray, ceiling_q: np.ndarray, depth: int) -> pa.Table:
        """Both lists of some queries to another depth, over the whole corpus, by the first miner."""
        found = search_shards(
            query_qD,
            self.document_vectors(task["dataset"]),
            plain=depth,
            under=depth if np.isfinite(ceiling_q).any() else 0,
            ceiling_Q=ceiling_q,
            count_above=True,
            precision=self.config.search.precision,
            device=self.config.search.device,
            tile=self.config.search.block_documents,
        )
        self.again += found.again
        return part_table(found)

    def searched(self, task: dict[str, Any], lane: int) -> pa.Table:
        """What all parts of the corpus hold for the group, merged (`PART_SCHEMA`)."""
        files = (self._segment_file(task, lane, segment) for segment in range(task["segments"]))
        return merged((read_table(uri) for uri in files), self.config.depth)

    # -- BM25 ---------------------------------------------------------------------------------------------------------

    def _is_bm25(self, lane: int) -> bool:
        return lane > 0 and isinstance(self.config.more_miners[lane - 1], Bm25Miner)

    def _bm25_search(
        self, task: dict[str, Any], queries: list[dict[str, Any]], k: int
    ) -> tuple[list[list[str]], list[np.ndarray], list[list[float]]]:
        if self._bm25 is None or self._bm25[0] != task["dataset"]:
            root = storage.join(self.paths.texts, task["dataset"], "documents")
            tables = [read_table(storage.join(root, name), ["key", "text"]) for name in list_shards(root)]
            rows = pa.concat_tables(tables)
            index = Bm25Index(rows.column("key").to_pylist(), rows.column("text").to_pylist())
            self._bm25 = (task["dataset"], index)
        texts = [row["text"] for row in queries]
        return self._bm25[1].search(texts, k, [row["positives"] for row in queries])

    def _bm25_part(self, task: dict[str, Any], queries: list[dict[str, Any]], ceiling_Q: np.ndarray) -> pa.Table:
        """Word statistics are the whole corpus', so its first part stands for all of it; the others hold nothing."""
        rows: list[dict[str, Any]] = [{"above": 0, "plain": [], "under": []} for _ in queries]
        if task["segment"] == 0:
            ids, scores, _ = self._bm25_search(task, queries, 4 * self.config.depth)
            for row, keys, values, ceiling in zip(rows, ids, scores, ceiling_Q, strict=True):
                items = [{"id": key, "score": float(value)} for key, value in zip(keys, values, strict=True)]
                below = [item for item in items if item["score"] < ceiling]
                row["above"] = len(items) - len(below)
                row["plain"], row["under"] = items[: self.config.depth], below[: self.config.depth]
        return pa.Table.from_pylist(rows, schema=PART_SCHEMA)
