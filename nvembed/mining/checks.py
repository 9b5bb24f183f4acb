"""The costly checks of candidates: near duplicates of a positive (Jaccard), and the candidate filter, a second model.

Both are masks over candidates that nothing else refuses. What they read of a corpus (texts, second vectors) is some
rows of nearly every shard: one pass picks these rows for a whole group of queries into a temporary file. Memory is
16 bytes per picked key and the rows that are checked at a time.

Shapes: Q queries of a group, K candidates that are checked, N positives.
"""

from __future__ import annotations

import itertools
import mmap
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core import storage
from nvembed.core.parquet import list_shards, read_rows
from nvembed.core.retry import placed
from nvembed.core.vectors import table_matrix
from nvembed.mining.layout import NEEDED, QueryTask
from nvembed.mining.lists import flat, owners
from nvembed.mining.rules import ceilings
from nvembed.mining.search import Searcher
from nvembed.mining.selection import CODE, Check, Rankings, Reason
from nvembed.retrieval.exact.topk import gathered_scores
from nvembed.text.identity import jaccard, word_triples

_KEY = "key"
_LARGE = {pa.string(): pa.large_string()}
_AT_ONCE = 512  # queries whose candidates' texts or second vectors are in memory together


class CandidateChecks:
    """The recipe's checks of the candidates of some queries.

    Args:
        queries: some of the group's, or all.
        rows_Q: their places in the group.
        ids: the documents that may be checked.
    """

    def __init__(
        self, searcher: Searcher, task: QueryTask, queries: pa.Table, rows_Q: np.ndarray, ids: pa.Array
    ) -> None:
        self._searcher, self._config, self._rows_Q = searcher, searcher.config, rows_Q
        self._positives = queries.column("positives")
        self._ceiling_Q = np.full(len(rows_Q), np.nan)  # of the filter, where it was needed
        wanted = pc.unique(pa.concat_arrays([ids, flat(self._positives)[1]]))
        roots = searcher.paths.texts, searcher.paths.vectors_of("candidate_filter")
        texts, vectors = (storage.join(root, task.dataset, "documents") for root in roots)
        reranker = self._config.cross_encoder
        if self._config.near_duplicate is not None or reranker is not None:
            self._texts = PickedRows(texts, wanted, ["text"])
        if reranker is not None:
            table = searcher.queries(task, (*NEEDED, "text", "instruction")).take(pa.array(rows_Q))
            self._queries = table.column("text").to_pylist()
            if reranker.instruction:
                before = table.column("instruction").to_pylist()
                self._queries = [left + right for left, right in zip(before, self._queries, strict=True)]
        elif self._config.candidate_filter is not None:
            self._vectors = PickedRows(vectors, wanted, ["vector"])
            self._query_QD = searcher.query_vectors(task, "candidate_filter")

    def of(self, rankings: Rankings) -> Check:
        """The check of rankings of these queries."""

        def check(owner_K: np.ndarray, at_K: np.ndarray) -> np.ndarray:
            ids, first_U = rankings.candidates.ids.take(pa.array(at_K)), np.unique(owner_K, return_index=True)[1]
            edges = itertools.pairwise([*first_U[::_AT_ONCE].tolist(), len(owner_K)])
            return np.concatenate([self._codes(owner_K[first:last], ids[first:last]) for first, last in edges])

        return check

    def _codes(self, owner_K: np.ndarray, ids: pa.Array) -> np.ndarray:
        """int8 [K]: 0, or the code of the reason that refuses the candidate of its query."""
        code_K = np.zeros(len(owner_K), dtype=np.int8)
        if self._config.near_duplicate is not None:
            code_K[self._near_duplicates(owner_K, ids)] = CODE[Reason.NEAR_DUPLICATE]
        if self._config.candidate_filter is not None:
            left_k = np.flatnonzero(code_K == 0)
            if not len(left_k):
                return code_K
            self._set_ceilings(np.unique(owner_K[left_k]))
            score_k = self._scores(owner_K[left_k], ids.take(pa.array(left_k)))
            code_K[left_k[~(score_k < self._ceiling_Q[owner_K[left_k]])]] = CODE[Reason.FILTERED]
        return code_K

    def _near_duplicates(self, owner_K: np.ndarray, ids: pa.Array) -> np.ndarray:
        """bool [K]: candidates that share too many word triples with a positive of their query."""
        assert self._config.near_duplicate is not None
        owner_U, names = np.unique(owner_K), ids.to_pylist()
        positives = dict(zip(owner_U.tolist(), self._positives.take(pa.array(owner_U)).to_pylist(), strict=True))
        texts = self._texts.take_column("text", {*names, *(key for keys in positives.values() for key in keys)})
        triples = {key: word_triples(text) for key, text in texts.items()}
        return np.array(
            [
                any(jaccard(triples[name], triples[key]) >= self._config.near_duplicate for key in positives[owner])
                for owner, name in zip(owner_K.tolist(), names, strict=True)
            ],
            dtype=bool,
        )

    def _set_ceilings(self, owners_U: np.ndarray) -> None:
        """The filter's ceilings of some queries, by the scores it gives their positives."""
        assert self._config.candidate_filter is not None
        new_U = owners_U[np.isnan(self._ceiling_Q[owners_U])]
        if len(new_U):
            start_U, ids = flat(self._positives.take(pa.array(new_U)))
            score_N = self._scores(new_U[owners(start_U)], ids)
            lowest_U = np.minimum.reduceat(score_N, start_U[:-1])
            self._ceiling_Q[new_U] = ceilings(self._config.candidate_filter.ceiling, lowest_U)

    def _scores(self, owner_K: np.ndarray, ids: pa.Array) -> np.ndarray:
        """float64 [K]: the filter's scores of documents for their queries, which rise."""
        if self._config.cross_encoder is None:
            table = self._vectors.take(pc.unique(ids))
            place_K = pc.index_in(ids, value_set=table.column(_KEY)).to_numpy()
            return gathered_scores(self._query_QD, self._rows_Q[owner_K], table_matrix(table), place_K)
        names, out_K = ids.to_pylist(), np.empty(len(owner_K))
        texts = self._texts.take_column("text", set(names))
        for owner in np.unique(owner_K).tolist():  # only one query's documents share a batch
            at = np.flatnonzero(owner_K == owner)
            documents = [texts[names[place]] for place in at]
            out_K[at] = self._searcher.reranker.scores(self._queries[owner], documents)
        return out_K


class PickedRows:
    """Some rows of a data set's shards by key, read in one pass into a temporary file.

    Args:
        uri: directory of shards; a key is in them once.
        wanted: keys (strings); one that no shard has is not picked.
        columns: the columns that are read beside the key.
    """

    def __init__(self, uri: str, wanted: pa.Array, columns: Sequence[str]) -> None:
        with placed(f"{tempfile.gettempdir()} (candidates lie there while they are checked; or set TMPDIR)"):
            shards = (storage.join(uri, name) for name in list_shards(uri))
            parts = _spilled(read_rows(shard, _KEY, wanted, [_KEY, *columns]) for shard in shards)
        empty = pa.table({name: pa.array([], pa.string()) for name in (_KEY, *columns)})
        self._table = pa.Table.from_batches(parts) if parts else empty
        # copied: index_in walks all of them, which should not read the file again
        self._keys = pa.array(self._table.column(_KEY).to_pylist(), pa.string())

    def take(self, keys: pa.Array) -> pa.Table:
        """Rows of the keys that were picked, in the order of `keys`."""
        return self._table.take(pc.index_in(keys, value_set=self._keys).drop_null())

    def take_column(self, column: str, keys: Iterable[str]) -> dict[str, str]:
        """Values of a column by key."""
        table = self.take(pa.array(sorted(keys), pa.string()))
        return dict(zip(table.column(_KEY).to_pylist(), table.column(column).to_pylist(), strict=True))


def _spilled(tables: Iterable[pa.Table]) -> list[pa.RecordBatch]:
    """The tables through a file that has no name, text as `large_string`."""
    with tempfile.TemporaryFile() as file:
        writer = None
        for table in tables:
            if table.num_rows:
                schema = pa.schema([field.with_type(_LARGE.get(field.type, field.type)) for field in table.schema])
                writer = writer or pa.ipc.new_file(file, schema)
                writer.write_table(table.cast(schema).combine_chunks())
        if writer is None:
            return []
        writer.close()
        file.flush()
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(data)))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]
