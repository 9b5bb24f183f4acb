"""The searching half of a mining actor: one group of queries against one part of the corpus, written to files.

Under `<work>/checkpoints/search/<dataset>/<group>/`: for every retriever (a *lane*) `lane-0-positives.parquet`, the
scores of the group's positives, and `lane-0-part-00000-hashed.parquet`, ..., what each part of the corpus holds for the
group. A file that is there is complete; whoever writes the last one of a group goes on to select. (Parts that an older
nvembed left have no text hashes and another name; they are searched again.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core import storage
from nvembed.core.vectors import iter_vectors, list_shards, read_table, table_matrix, write_table
from nvembed.data.tables import SCORED_IDS
from nvembed.mining import words
from nvembed.mining.config import Bm25Retriever, MineConfig, RandomNegatives
from nvembed.mining.lists import flat, list_array, owners, starts
from nvembed.mining.rejected import NEEDED, Rejected
from nvembed.mining.rules import ceilings
from nvembed.mining.searched import FOUND_SCHEMA, PART_SCHEMA, found_table, merged
from nvembed.retrieval.ann import FaissPart
from nvembed.retrieval.bm25 import Bm25Index
from nvembed.retrieval.config import ExactIndex
from nvembed.retrieval.cross_encoder import CrossScorer
from nvembed.retrieval.exact.search import Found, pair_scores, search_shards
from nvembed.types import UserError

QUERY_COLUMNS = ("key", "hash", "positives", "own", "never", "given")
_HASHES_AT_ONCE = 1 << 20  # documents whose ids and text hashes are in memory together: some 40 MB


@dataclass(frozen=True)
class MinePaths:
    """Working directories of one `mine` step."""

    texts: str
    vectors: str
    search: str
    select: str
    searched: str  # output of the step that searched: this one, or the one that is selected from again

    @classmethod
    def under(cls, work_uri: str, reuse: str | None = None) -> MinePaths:
        """The layout below a step's `checkpoints/`."""
        texts, vectors, search, select = (
            storage.join(work_uri, "checkpoints", name) for name in ("texts", "vectors", "search", "select")
        )
        return cls(texts, vectors, search, select, reuse or work_uri)

    def lane_vectors(self, lane: int | str) -> str:
        """Vectors of a lane; the first retriever's lie where there was only one."""
        return self.vectors if lane == 0 else f"{self.vectors}_{lane}"


class Searcher:
    """Reads texts and vectors of a group, searches, and keeps what it found in files."""

    def __init__(self, config: MineConfig, paths: MinePaths) -> None:
        self.config, self.paths = config, paths
        self.lanes = 1 + len(config.more_retrievers)
        self.again = 0  # queries of which a part was searched again in fp32
        self._indexes = words.WordIndexes()
        self._parts: dict[int, tuple[tuple[str, tuple[str, ...]], FaissPart]] = {}  # by lane
        self._texts: tuple[str, list[str], pa.Table] | None = None  # hashes last read, where a table holds them all
        self._cross: CrossScorer | None = None
        self._rejected: dict[str, Rejected] = {}

    def cross_encoder(self) -> CrossScorer | None:
        """The judge, loaded when first asked for; None where there is none or it is an embedder."""
        if self._cross is None and self.config.cross_encoder is not None:
            self._cross = CrossScorer(self.config.cross_encoder, self.config.search.device)
        return self._cross

    # -- files --------------------------------------------------------------------------------------------------------

    def _file(self, task: dict[str, Any], lane: int, name: str) -> str:
        return storage.join(self.paths.search, task["dataset"], task["part"], f"lane-{lane}-{name}.parquet")

    def _segment_file(self, task: dict[str, Any], lane: int, segment: int) -> str:
        return self._file(task, lane, f"part-{segment:05d}-hashed")

    def left(self, task: dict[str, Any]) -> list[int]:
        """Parts of the corpus that were not searched yet for the task's group; one listing of its directory."""
        there = set(storage.list_directory(storage.join(self.paths.search, task["dataset"], task["part"])))
        wanted = {
            segment: {self._segment_file(task, lane, segment).rsplit("/", 1)[-1] for lane in range(self.lanes)}
            for segment in range(task["segments"])
        }
        return [segment for segment, names in wanted.items() if not names <= there]

    def rejected(self, dataset: str) -> Rejected:
        """What has no vector; read once."""
        if dataset not in self._rejected:
            self._rejected[dataset] = Rejected.read(self.paths.searched, dataset)
        return self._rejected[dataset]

    def queries(self, task: dict[str, Any], columns: Sequence[str] = QUERY_COLUMNS) -> pa.Table:
        """The group's queries with what is known about them (at least `rejected.NEEDED`)."""
        root = storage.join(self.paths.texts, task["dataset"], "queries")
        table = pa.concat_tables([read_table(storage.join(root, name), list(columns)) for name in task["shards"]])
        rejected = self.rejected(task["dataset"])
        return rejected.without(table) if len(rejected) else table

    def query_rows(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        """The group's queries as Python objects, texts included."""
        rows: list[dict[str, Any]] = self.queries(task, (*QUERY_COLUMNS, "text", "instruction")).to_pylist()
        return rows

    def query_vectors(self, task: dict[str, Any], lane: int | str) -> np.ndarray:
        """float32 [Q, D] of the group, in the order of `queries`."""
        root = storage.join(self.paths.lane_vectors(lane), task["dataset"], "queries")
        tables = [read_table(storage.join(root, name)) for name in task["shards"]]
        query_QD = np.concatenate([table_matrix(table) for table in tables])
        if not len(self.rejected(task["dataset"])):
            return query_QD
        keys = pa.chunked_array([chunk for table in tables for chunk in table.column("key").chunks])
        wanted = self.queries(task, NEEDED).column("key").combine_chunks()
        return query_QD[pc.index_in(wanted, value_set=keys.combine_chunks()).to_numpy()]

    def document_vectors(
        self, dataset: str, lane: int | str = 0, names: list[str] | None = None
    ) -> Iterator[tuple[list[str], np.ndarray]]:
        """The corpus, or some shards of it, one shard in memory at a time; without what any of the models rejected."""
        gone = frozenset(self.rejected(dataset).documents.to_pylist())
        for keys, matrix_ND in iter_vectors(storage.join(self.paths.lane_vectors(lane), dataset, "documents"), names):
            if gone.isdisjoint(keys):
                yield keys, matrix_ND
            else:
                kept = [row for row, key in enumerate(keys) if key not in gone]
                yield [keys[row] for row in kept], matrix_ND[kept]

    def vectors_of(self, dataset: str, wanted: set[str], lane: int | str) -> tuple[dict[str, int], np.ndarray]:
        """Row by id and vectors of the named documents; of the other shards only the ids are read."""
        root = storage.join(self.paths.lane_vectors(lane), dataset, "documents")
        values = pa.array(sorted(wanted), pa.string())
        keys: list[str] = []
        parts: list[np.ndarray] = []
        for name in list_shards(root):
            uri = storage.join(root, name)
            # not pc.indices_nonzero, which dies on a shard without rows
            rows = np.flatnonzero(np.asarray(pc.is_in(read_table(uri, ["key"]).column("key"), value_set=values)))
            if len(rows):
                table = read_table(uri, ["key", "vector"])
                keys += table.column("key").take(pa.array(rows)).to_pylist()
                parts.append(table_matrix(table)[rows])
        matrix = np.concatenate(parts) if parts else np.empty((0, 1), dtype=np.float32)
        return {key: row for row, key in enumerate(keys)}, matrix

    # -- positives ----------------------------------------------------------------------------------------------------

    def positives(self, task: dict[str, Any], lane: int) -> pa.ChunkedArray:
        """Exact scores of each query's positives (`SCORED_IDS`); read again when they were computed before.

        Raises:
            UserError: a positive is not in the corpus.
        """
        uri = self._file(task, lane, "positives")
        if storage.exists(uri):
            return read_table(uri).column("positives")
        queries = self.query_rows(task)
        if self._is_bm25(lane):
            found = words.positive_scores(self._words(task["dataset"]), queries)
        else:
            ids = [row["positives"] for row in queries]
            place, vectors = self.vectors_of(task["dataset"], {key for keys in ids for key in keys}, lane)
            found = scores_by_id(queries, self.query_vectors(task, lane), ids, place, vectors)
        rows = [{"positives": [{"id": key, "score": score} for key, score in row.items()]} for row in found]
        table = pa.Table.from_pylist(rows, schema=pa.schema([("positives", SCORED_IDS)]))
        write_table(table, uri)
        return table.column("positives")

    def lowest(self, positives: pa.ChunkedArray) -> np.ndarray:
        """float64 [Q], the lowest score among each query's positives."""
        start_Q, values = flat(positives)
        assert (np.diff(start_Q) > 0).all(), "a query without a positive was laid out"
        score_P = np.asarray(values.field("score").to_numpy(zero_copy_only=False))
        return np.minimum.reduceat(score_P, start_Q[:-1]) if len(score_P) else np.empty(0)

    def ceiling(self, lowest_Q: np.ndarray) -> np.ndarray:
        """float64 [Q] of the recipe's rule."""
        assert not isinstance(self.config.rule, RandomNegatives)
        return ceilings(self.config.rule, lowest_Q)

    # -- text hashes --------------------------------------------------------------------------------------------------

    def _key_hashes(self, dataset: str, names: list[str]) -> Iterator[pa.Table]:
        """Ids and text hashes of some shards of documents, many shards at a time."""
        if self._texts is not None and self._texts[:2] == (dataset, names):
            yield self._texts[2]
            return
        root = storage.join(self.paths.texts, dataset, "documents")
        waiting: list[pa.Table] = []
        count, whole = 0, True
        for name in names:
            table = read_table(storage.join(root, name), ["key", "hash"])
            if waiting and count + table.num_rows > _HASHES_AT_ONCE:
                yield pa.concat_tables(waiting).combine_chunks()
                waiting, count, whole = [], 0, False
            waiting.append(table)
            count += table.num_rows
        if not waiting:
            return
        last = pa.concat_tables(waiting).combine_chunks()
        if whole:  # the next group asks for the same
            self._texts = (dataset, names, last)
        yield last

    def hashes_of(self, dataset: str, ids: pa.Array, names: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [N], bool [N]): text hashes of documents, and whether some shards (all, by default) hold them."""
        hash_N, found_N = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=bool)
        if names is None:
            names = list_shards(storage.join(self.paths.texts, dataset, "documents"))
        left_N = np.arange(len(ids))
        for table in self._key_hashes(dataset, names) if len(ids) else ():
            few = ids if len(left_N) == len(ids) else ids.take(pa.array(left_N))
            place = pc.index_in(few, value_set=table.column("key"))
            here_n = place.is_valid().to_numpy(zero_copy_only=False)
            hash_N[left_N[here_n]] = table.column("hash").to_numpy()[place.drop_null().to_numpy()]
            found_N[left_N[here_n]] = True
            left_N = left_N[~here_n]
        return hash_N, found_N

    def documents_at(self, dataset: str, place_U: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Ids and text hashes (int64) of documents by their places in the shards, which must rise."""
        root = storage.join(self.paths.texts, dataset, "documents")
        ids: list[str] = []
        parts = [np.zeros(0, dtype=np.int64)]
        start = 0
        for table in self._key_hashes(dataset, list_shards(root)):
            first, last = np.searchsorted(place_U, [start, start + table.num_rows])
            here = table.take(pa.array(place_U[first:last] - start))
            ids += here.column("key").to_pylist()
            parts.append(here.column("hash").to_numpy())
            start += table.num_rows
        return ids, np.concatenate(parts)

    def hashed(
        self, task: dict[str, Any], table: pa.Table, queries: pa.Table, names: list[str] | None = None
    ) -> pa.Table:
        """What was found (`FOUND_SCHEMA`) with text hashes (`PART_SCHEMA`), read from the documents' shards.

        Args:
            names: the shards that were searched; all by default.
        """
        columns: dict[str, Any] = {name: table.column(name) for name in FOUND_SCHEMA.names}
        (plain_Q, plain), (under_Q, under) = (flat(table.column(name)) for name in ("plain", "under"))
        never_Q, never = flat(queries.column("never"))
        ids = pa.concat_arrays([plain.field("id"), under.field("id"), never])
        hash_P, found_P = self.hashes_of(task["dataset"], ids, names)
        behind = len(plain) + len(under)
        assert found_P[:behind].all(), "a document was found that has no text"
        columns["plain_hashes"] = list_array(plain_Q, pa.array(hash_P[: len(plain)]))
        columns["under_hashes"] = list_array(under_Q, pa.array(hash_P[len(plain) : behind]))
        here_N = found_P[behind:]
        count_Q = np.bincount(owners(never_Q)[here_N], minlength=len(never_Q) - 1)
        columns["never_hashes"] = list_array(starts(count_Q), pa.array(hash_P[behind:][here_N]))
        return pa.table(columns, schema=PART_SCHEMA)

    # -- search -------------------------------------------------------------------------------------------------------

    def search_segment(self, task: dict[str, Any], queries: pa.Table) -> None:
        """Search the task's part of the corpus with every retriever that has not done so."""
        for lane in range(self.lanes):
            uri = self._segment_file(task, lane, task["segment"])
            if storage.exists(uri):
                continue
            ceiling_Q = self.ceiling(self.lowest(self.positives(task, lane)))
            if self._is_bm25(lane):
                table = self._bm25_part(task, ceiling_Q)
            else:
                found = self._search(task, lane, ceiling_Q)
                self.again += found.again
                table = found_table(found)
            names = task["documents"]
            if self._is_bm25(lane):  # its first part stands for the whole corpus
                names = None if task["segment"] == 0 else []
            write_table(self.hashed(task, table, queries, names), uri)

    def _search(self, task: dict[str, Any], lane: int, ceiling_Q: np.ndarray) -> Found:
        config, search = self.config, self.config.search
        under = config.depth if np.isfinite(ceiling_Q).any() else 0
        query_QD = self.query_vectors(task, lane)
        if isinstance(search.index, ExactIndex):
            return search_shards(
                query_QD,
                self.document_vectors(task["dataset"], lane, task["documents"]),
                plain=config.depth,
                under=under,
                ceiling_Q=ceiling_Q,
                count_above=True,
                precision=search.precision,
                device=search.device,
                tile=search.block_documents,
            )
        return self._part(task, lane).search(query_QD, plain=config.depth, under=under, ceiling_Q=ceiling_Q)

    def _part(self, task: dict[str, Any], lane: int) -> FaissPart:
        """The index of the task's part of the corpus; that of the last task where it is the same."""
        index = self.config.search.index
        assert not isinstance(index, ExactIndex)
        wanted = task["dataset"], tuple(task["documents"])
        if lane not in self._parts or self._parts[lane][0] != wanted:
            self._parts.pop(lane, None)  # freed before the next is built
            parts = list(self.document_vectors(task["dataset"], lane, task["documents"]))
            ids_N = np.array([key for keys, _ in parts for key in keys], dtype=object)
            matrix_ND = np.concatenate([part for _, part in parts])
            part = FaissPart(index, ids_N, matrix_ND, self.config.encode.threads_per_actor)
            self._parts[lane] = wanted, part
        return self._parts[lane][1]

    def deeper(self, task: dict[str, Any], query_qD: np.ndarray, ceiling_q: np.ndarray, depth: int) -> pa.Table:
        """Both lists of some queries to another depth, over the whole corpus, by the first retriever."""
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
        return found_table(found)

    def searched(self, task: dict[str, Any], lane: int) -> pa.Table:
        """What all parts of the corpus hold for the group, merged (`PART_SCHEMA`)."""
        files = (self._segment_file(task, lane, segment) for segment in range(task["segments"]))
        return merged((read_table(uri) for uri in files), self.config.depth)

    # -- BM25 ---------------------------------------------------------------------------------------------------------

    def _is_bm25(self, lane: int) -> bool:
        return lane > 0 and isinstance(self.config.more_retrievers[lane - 1], Bm25Retriever)

    def _words(self, dataset: str) -> Bm25Index:
        uri = storage.join(self.paths.texts, dataset, "documents")
        return self._indexes.of(uri, dataset, self.rejected(dataset).documents)

    def _bm25_part(self, task: dict[str, Any], ceiling_Q: np.ndarray) -> pa.Table:
        if task["segment"] != 0:
            return words.nothing(len(ceiling_Q))
        return words.best(self._words(task["dataset"]), self.query_rows(task), ceiling_Q, self.config.depth)


def scores_by_id(
    queries: Sequence[dict[str, Any]],
    query_QD: np.ndarray,
    ids: Sequence[Sequence[str]],
    place: Mapping[str, int],
    vectors: np.ndarray,
) -> list[dict[str, float]]:
    """Exact scores of chosen documents of each query, by id.

    Args:
        ids: Q lists of documents, positives among them.
        place: the documents' rows in `vectors`.

    Raises:
        UserError: a document is not there.
    """
    pairs = [(index, key) for index, keys in enumerate(ids) for key in keys]
    for index, key in pairs:
        if key not in place:
            raise UserError(
                f"example {queries[index]['key']!r} names {key!r} as its positive, which is missing from the "
                "corpus of its data set. Prepare it again."
            )
    found: list[dict[str, float]] = [{} for _ in queries]
    for start in range(0, len(pairs), 8192):
        block = pairs[start : start + 8192]
        left, right = query_QD[[index for index, _ in block]], vectors[[place[key] for _, key in block]]
        for (index, key), value in zip(block, pair_scores(left, right), strict=True):
            found[index][key] = float(value)
    return found
