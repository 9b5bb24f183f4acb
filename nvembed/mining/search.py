"""The search of a mining actor: a group of queries against one part of the corpus, by every retriever, into files.

Under `<work>/checkpoints/search/<dataset>/<group>/`: `retriever-0-positives.parquet`, the scores of the group's
positives by the first retriever, and `retriever-0-segment-00000.parquet`, ..., its candidates in each part of the
corpus (`PART_SCHEMA`). A file that exists is complete; the worker that writes the last one of a group selects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core import storage
from nvembed.core.parquet import column_size, even_tables, list_shards, read_rows, read_table
from nvembed.core.vectors import iter_vectors, table_matrix, write_shard
from nvembed.data.tables import SCORED_IDS
from nvembed.mining.config import Bm25Retriever, MineConfig, RandomNegatives
from nvembed.mining.layout import NEEDED, MinePaths, QueryTask, Rejected, SearchTask
from nvembed.mining.lists import (
    PART_SCHEMA,
    filtered,
    flat,
    kept,
    list_array,
    lowest_scores,
    merge_parts,
    owners,
    places_of,
    scored_array,
    search_table,
)
from nvembed.mining.rules import ceilings
from nvembed.retrieval.ann import FaissPart
from nvembed.retrieval.bm25 import Bm25Index, check_memory
from nvembed.retrieval.config import ExactIndex
from nvembed.retrieval.cross_encoder import CrossScorer
from nvembed.retrieval.exact.search import SearchResult, Shards, search_shards
from nvembed.retrieval.exact.topk import gathered_scores
from nvembed.types import UserError

QUERY_COLUMNS = ("key", "hash", "positives", "own", "never", "given")


class Searcher:
    """Reads texts and vectors of a group, searches, and writes the results to files.

    Args:
        hashes_at_once: documents whose ids and text hashes are in memory together; by default some 40 MB.

    Attributes:
        retrievers: how many propose candidates.
        again: queries of which a part was searched again in fp32.
    """

    def __init__(self, config: MineConfig, paths: MinePaths, hashes_at_once: int = 1 << 20) -> None:
        self.config, self.paths, self._hashes_at_once = config, paths, hashes_at_once
        self.retrievers = 1 + len(config.more_retrievers)
        self.again = 0
        self._bm25: tuple[str, Bm25Index] | None = None  # of the last data set
        self._parts: dict[int, tuple[tuple[str, Sequence[str]], FaissPart]] = {}  # by retriever
        self._hashes: tuple[str, tuple[str, ...], pa.Table] | None = None  # last read, where a table has them all
        self._rejected: dict[str, Rejected] = {}

    @cached_property
    def reranker(self) -> CrossScorer:
        """The cross-encoder of the candidate filter, loaded once."""
        assert self.config.cross_encoder is not None
        return CrossScorer(self.config.cross_encoder, self.config.search.device)

    # -- queries and vectors ------------------------------------------------------------------------------------------

    def rejected(self, dataset: str) -> Rejected:
        """Texts without a vector; read once."""
        if dataset not in self._rejected:
            self._rejected[dataset] = Rejected.read(self.paths.searched, dataset)
        return self._rejected[dataset]

    def queries(self, task: QueryTask, columns: Sequence[str] = QUERY_COLUMNS) -> pa.Table:
        """The group's queries with what is known about them (at least `layout.NEEDED`)."""
        root = storage.join(self.paths.texts, task.dataset, "queries")
        table = pa.concat_tables([read_table(storage.join(root, name), columns) for name in task.shards])
        return self.rejected(task.dataset).without(table)

    def query_vectors(self, task: QueryTask, model: int | str) -> np.ndarray:
        """float32 [Q, D] by a retriever or the "candidate_filter", in the order of `queries`."""
        root = storage.join(self.paths.vectors_of(model), task.dataset, "queries")
        tables = [read_table(storage.join(root, name)) for name in task.shards]
        query_QD = np.concatenate([table_matrix(table) for table in tables])
        if not len(self.rejected(task.dataset)):
            return query_QD
        keys = pa.chunked_array([chunk for table in tables for chunk in table.column("key").chunks])
        return query_QD[pc.index_in(self.queries(task, NEEDED).column("key"), value_set=keys).to_numpy()]

    def document_vectors(
        self, dataset: str, retriever: int = 0, names: Sequence[str] | None = None
    ) -> Iterator[tuple[list[str], np.ndarray]]:
        """The corpus, or some shards of it, one shard in memory at a time; without what any of the models rejected."""
        rejected = frozenset(self.rejected(dataset).documents.to_pylist())
        root = storage.join(self.paths.vectors_of(retriever), dataset, "documents")
        for keys, matrix_ND in iter_vectors(root, None if names is None else list(names)):
            if rejected.isdisjoint(keys):
                yield keys, matrix_ND
            else:
                rows = [row for row, key in enumerate(keys) if key not in rejected]
                yield [keys[row] for row in rows], matrix_ND[rows]

    # -- positives ----------------------------------------------------------------------------------------------------

    def positives(self, task: SearchTask, retriever: int) -> pa.ChunkedArray:
        """Exact scores of each query's positives (`SCORED_IDS`); read again when they were computed before.

        Raises:
            UserError: a positive is not in the corpus.
        """
        uri = self._file(task, retriever, "positives")
        if storage.exists(uri):
            return read_table(uri).column("positives")
        start_Q, ids = flat(self.queries(task, NEEDED).column("positives"))
        if self._is_bm25(retriever):
            table = self.queries(task, (*NEEDED, "text"))
            texts, wanted = table.column("text").to_pylist(), table.column("positives").to_pylist()
            lists = self._bm25_index(task.dataset).search(texts, 1, wanted)[2]
            score_N = np.array([score for scores in lists for score in scores], dtype=np.float64)
        else:
            score_N = self._scores(task, retriever, start_Q, ids)
        # an id that is named twice is scored once
        first_N = places_of(owners(start_Q), ids, start_Q, ids) == np.arange(len(ids))
        column = kept(scored_array(start_Q, ids, pa.array(score_N)), first_N)
        write_shard(pa.table({"positives": column}), uri)
        return pa.chunked_array([column])

    def _scores(self, task: SearchTask, retriever: int, start_Q: np.ndarray, ids: pa.Array) -> np.ndarray:
        """float64 [N] of lists of documents by a retriever's vectors."""
        root = storage.join(self.paths.vectors_of(retriever), task.dataset, "documents")
        tables = [
            read_rows(storage.join(root, name), "key", ids.unique(), ["key", "vector"]) for name in list_shards(root)
        ]
        table = pa.concat_tables([table for table in tables if table.num_rows] or tables[:1])
        place = pc.index_in(ids, value_set=table.column("key"))
        if place.null_count:
            at = int(np.argmin(place.is_valid().to_numpy(zero_copy_only=False)))
            example = self.queries(task, NEEDED).column("key")[int(owners(start_Q)[at])].as_py()
            raise UserError(
                f"example {example!r} names {ids[at].as_py()!r} as its positive, which is missing from the corpus of "
                "its data set. Prepare it again."
            )
        query_QD = self.query_vectors(task, retriever)
        return gathered_scores(query_QD, owners(start_Q), table_matrix(table), place.to_numpy())

    # -- text hashes --------------------------------------------------------------------------------------------------

    def _key_hashes(self, dataset: str, names: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Ids and text hashes of some shards of documents (all, by default), many shards at a time."""
        root, count = storage.join(self.paths.texts, dataset, "documents"), 0
        names = tuple(list_shards(root) if names is None else names)
        if self._hashes is not None and self._hashes[:2] == (dataset, names):
            yield self._hashes[2]
            return
        tables = (read_table(storage.join(root, name), ["key", "hash"]) for name in names)
        for count, table in enumerate(even_tables(tables, self._hashes_at_once), start=1):  # noqa: B007
            yield table
        if count == 1:  # the next group needs the same
            self._hashes = (dataset, names, table)

    def hashes_of(
        self, dataset: str, ids: pa.Array, names: Sequence[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [N], bool [N]): text hashes of documents, and whether some shards (all, by default) hold them."""
        hash_N, present_N = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=bool)
        left_N = np.arange(len(ids))
        for table in self._key_hashes(dataset, names) if len(ids) else ():
            few = ids if len(left_N) == len(ids) else ids.take(pa.array(left_N))
            place = pc.index_in(few, value_set=table.column("key"))
            here_n = place.is_valid().to_numpy(zero_copy_only=False)
            hash_N[left_N[here_n]] = table.column("hash").to_numpy()[place.drop_null().to_numpy()]
            present_N[left_N[here_n]] = True
            left_N = left_N[~here_n]
        return hash_N, present_N

    def documents_at(self, dataset: str, place_U: np.ndarray) -> tuple[pa.Array, np.ndarray]:
        """Ids and text hashes (int64) of documents by their places in the shards, which must rise."""
        ids, hashes, start = [pa.array([], pa.string())], [np.zeros(0, dtype=np.int64)], 0
        for table in self._key_hashes(dataset):
            first, last = np.searchsorted(place_U, [start, start + table.num_rows])
            here = table.take(pa.array(place_U[first:last] - start))
            ids += here.column("key").chunks
            hashes.append(here.column("hash").to_numpy())
            start += table.num_rows
        return pa.concat_arrays(ids), np.concatenate(hashes)

    def hashed(self, dataset: str, table: pa.Table, queries: pa.Table, names: Sequence[str] | None = None) -> pa.Table:
        """A search result with the hashes of `PART_SCHEMA` beside its columns, read from the documents' shards.

        Args:
            names: the shards that were searched; all by default.
        """
        (plain_Q, plain), (under_Q, under) = (flat(table.column(name)) for name in ("plain", "under"))
        never_Q, never = flat(queries.column("never"))
        ids = pa.concat_arrays([plain.field("id"), under.field("id"), never])
        hash_P, present_P = self.hashes_of(dataset, ids, names)
        edges = np.cumsum([len(plain), len(under)])
        (plain_P, under_P, never_P), (*searched, here_N) = np.split(hash_P, edges), np.split(present_P, edges)
        assert all(present_P.all() for present_P in searched), "a document was searched that has no text"
        lists = (plain_Q, plain_P), (under_Q, under_P), (filtered(never_Q, here_N), never_P[here_N])
        for name, (start_Q, hashes) in zip(PART_SCHEMA.names[-3:], lists, strict=True):
            table = table.append_column(name, list_array(start_Q, pa.array(hashes)))
        return table

    # -- search -------------------------------------------------------------------------------------------------------

    def _file(self, task: SearchTask, retriever: int, name: str) -> str:
        return storage.join(self.paths.search, task.dataset, task.group, f"retriever-{retriever}-{name}.parquet")

    def _segment_file(self, task: SearchTask, retriever: int, segment: int) -> str:
        return self._file(task, retriever, f"segment-{segment:05d}")

    def segments_left(self, task: SearchTask) -> list[int]:
        """Parts of the corpus that were not searched yet for the task's group; one listing of its directory."""
        written = set(storage.list_directory(storage.join(self.paths.search, task.dataset, task.group)))
        wanted = {
            segment: {self._segment_file(task, number, segment).rsplit("/", 1)[-1] for number in range(self.retrievers)}
            for segment in range(task.segments)
        }
        return [segment for segment, names in wanted.items() if not names <= written]

    def search_segment(self, task: SearchTask, queries: pa.Table) -> None:
        """Search the task's part of the corpus with every retriever that has not done so."""
        assert task.segment is not None
        for retriever in range(self.retrievers):
            uri = self._segment_file(task, retriever, task.segment)
            if storage.exists(uri):
                continue
            ceiling_Q = self._ceiling(self.positives(task, retriever))
            names: Sequence[str] | None = task.documents
            if self._is_bm25(retriever):  # word statistics are the whole corpus': its first part has all results
                names = None if task.segment == 0 else []
                table = self._bm25_table(task, ceiling_Q)
            else:
                result = self._search(task, retriever, ceiling_Q)
                self.again += result.again
                table = search_table(result)
            write_shard(self.hashed(task.dataset, table, queries, names), uri)

    def _ceiling(self, positives: pa.ChunkedArray) -> np.ndarray:
        assert not isinstance(self.config.rule, RandomNegatives)
        return ceilings(self.config.rule, lowest_scores(positives))

    def _search(self, task: SearchTask, retriever: int, ceiling_Q: np.ndarray) -> SearchResult:
        config, index = self.config, self.config.search.index
        query_QD = self.query_vectors(task, retriever)
        if isinstance(index, ExactIndex):
            shards = self.document_vectors(task.dataset, retriever, task.documents)
            return self._search_exactly(query_QD, shards, ceiling_Q, config.depth)
        wanted = task.dataset, task.documents
        if retriever not in self._parts or self._parts[retriever][0] != wanted:
            self._parts.pop(retriever, None)  # freed before the next is built
            parts = list(self.document_vectors(task.dataset, retriever, task.documents))
            ids_N = np.array([key for keys, _ in parts for key in keys], dtype=object)
            matrix_ND = np.concatenate([part for _, part in parts])
            self._parts[retriever] = wanted, FaissPart(index, ids_N, matrix_ND, config.encode.threads_per_actor)
        under = config.depth if np.isfinite(ceiling_Q).any() else 0
        return self._parts[retriever][1].search(query_QD, plain=config.depth, under=under, ceiling_Q=ceiling_Q)

    def _search_exactly(self, query_QD: np.ndarray, shards: Shards, ceiling_Q: np.ndarray, depth: int) -> SearchResult:
        return search_shards(
            query_QD,
            shards,
            plain=depth,
            under=depth if np.isfinite(ceiling_Q).any() else 0,
            ceiling_Q=ceiling_Q,
            count_above=True,
            precision=self.config.search.precision,
            device=self.config.search.device,
            tile=self.config.search.block_documents,
        )

    def deeper(
        self, dataset: str, queries: pa.Table, query_qD: np.ndarray, ceiling_q: np.ndarray, depth: int
    ) -> pa.Table:
        """Some queries searched to another depth, over the whole corpus, by the first retriever.

        Returns:
            `PART_SCHEMA` and the column `ceiling`.
        """
        result = self._search_exactly(query_qD, self.document_vectors(dataset), ceiling_q, depth)
        self.again += result.again
        table = self.hashed(dataset, search_table(result), queries)
        return table.append_column("ceiling", pa.array(ceiling_q))

    def searched(self, task: SearchTask, queries: pa.Table, retriever: int) -> pa.Table:
        """The results of a retriever for the group in all parts of the corpus: `SEARCHED_SCHEMA` and `PART_SCHEMA`."""
        files = (self._segment_file(task, retriever, segment) for segment in range(task.segments))
        positives = self.positives(task, retriever)
        table = merge_parts((read_table(uri) for uri in files), self.config.depth)
        table = table.append_column("example_id", queries.column("key")).append_column("positives", positives)
        return table.append_column("ceiling", pa.array(self._ceiling(positives)))

    # -- BM25 ---------------------------------------------------------------------------------------------------------

    def _is_bm25(self, retriever: int) -> bool:
        return retriever > 0 and isinstance(self.config.more_retrievers[retriever - 1], Bm25Retriever)

    def _bm25_index(self, dataset: str) -> Bm25Index:
        """The index of a data set's documents.

        Raises:
            UserError: this machine has not the memory for it.
        """
        if self._bm25 is None or self._bm25[0] != dataset:
            self._bm25 = None  # freed before the next is built
            root = storage.join(self.paths.texts, dataset, "documents")
            uris = [storage.join(root, name) for name in list_shards(root)]
            documents, text_bytes = map(sum, zip(*(column_size(uri, "text") for uri in uris), strict=True))
            check_memory(dataset, documents, text_bytes, psutil.virtual_memory().available)
            rows = pa.concat_tables([read_table(uri, ["key", "text"]) for uri in uris])
            rejected = self.rejected(dataset).documents
            rows = rows.filter(pc.invert(pc.is_in(rows.column("key"), value_set=rejected)))
            self._bm25 = dataset, Bm25Index(rows.column("key").to_pylist(), rows.column("text").to_pylist())
        return self._bm25[1]

    def _bm25_table(self, task: SearchTask, ceiling_Q: np.ndarray) -> pa.Table:
        """BM25's result for the whole corpus in its first part, an empty one in the others."""
        depth, rows = self.config.depth, [{"above": 0, "plain": [], "under": []}] * len(ceiling_Q)
        if task.segment == 0:
            texts = self.queries(task, (*NEEDED, "text")).column("text").to_pylist()
            ids, scores, _ = self._bm25_index(task.dataset).search(texts, 4 * depth)
            rows = []
            for keys, values, ceiling in zip(ids, scores, ceiling_Q, strict=True):
                items = [{"id": key, "score": float(value)} for key, value in zip(keys, values, strict=True)]
                below = [item for item in items if item["score"] < ceiling]
                rows.append({"above": len(items) - len(below), "plain": items[:depth], "under": below[:depth]})
        schema = pa.schema([("above", pa.int64()), ("plain", SCORED_IDS), ("under", SCORED_IDS)])
        return pa.Table.from_pylist(rows, schema=schema)
