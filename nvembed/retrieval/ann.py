"""FAISS as the approximate (or flat) alternative to the exact search; `pip install 'nvembed[faiss]'`.

An index is built over each part of the corpus and proposes candidates; they are scored again in fp64 like the exact
search's, so scores mean the same. Documents that FAISS does not propose are missing: the audit reports the recall.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nvembed.retrieval.config import ExactIndex, FaissFlat, FaissHnsw, FaissIvf
from nvembed.retrieval.exact.search import SearchResult
from nvembed.retrieval.exact.topk import Best, gathered_scores
from nvembed.types import UserError

_TRAIN_PER_LIST = 64
_POINTS_PER_LIST = 39  # the minimum of FAISS


def check_faiss(index: ExactIndex | FaissFlat | FaissIvf | FaissHnsw) -> None:
    """Refuse an index of FAISS where it is not installed.

    Raises:
        UserError: saying how to install it.
    """
    if isinstance(index, ExactIndex):
        return
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        raise UserError(f"search.index {index.type} needs FAISS: pip install 'nvembed[faiss]'") from error


def build_index(config: FaissFlat | FaissIvf | FaissHnsw, document_ND: np.ndarray, threads: int) -> Any:
    """An inner-product index over fp32 rows. The same rows give the same index at one thread."""
    import faiss

    faiss.omp_set_num_threads(threads)
    count, dim = document_ND.shape
    index: Any
    if isinstance(config, FaissIvf):
        lists = max(min(config.lists, count // _POINTS_PER_LIST), 1)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
        step = max(count // (lists * _TRAIN_PER_LIST), 1)
        index.train(np.ascontiguousarray(document_ND[::step]))
        index.nprobe = min(config.probes, lists)
    elif isinstance(config, FaissHnsw):
        index = faiss.IndexHNSWFlat(dim, config.links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = config.build_width, config.search_width
    else:
        index = faiss.IndexFlatIP(dim)
    index.add(document_ND)
    return index


class FaissPart:
    """One part of the corpus in memory, and its index: built once, searched for any number of query groups.

    Args:
        ids_N: N ids.
        document_ND: float32 vectors, for the scores; FAISS has its own copy.
    """

    def __init__(
        self, config: FaissFlat | FaissIvf | FaissHnsw, ids_N: np.ndarray, document_ND: np.ndarray, threads: int = 1
    ) -> None:
        self._config, self._ids_N = config, ids_N
        self._document_ND = np.ascontiguousarray(document_ND, dtype=np.float32)
        self._index = build_index(config, self._document_ND, threads) if len(ids_N) else None

    def search(
        self, query_QD: np.ndarray, *, plain: int, under: int = 0, ceiling_Q: np.ndarray | None = None
    ) -> SearchResult:
        """`search_shards` over this part, by FAISS.

        Candidates are the best `plain + under` that FAISS finds; the list below the ceiling and the count above it are
        made from these, so both are lower bounds of the truth.
        """
        queries, ids_N = len(query_QD), self._ids_N
        query_QD = np.ascontiguousarray(query_QD, dtype=np.float32)
        best = Best(queries, plain)
        below = Best(queries, under) if under and ceiling_Q is not None else None
        above_Q = np.zeros(queries, dtype=np.int64)
        if self._index is not None and queries:
            if isinstance(self._config, FaissHnsw):
                self._index.hnsw.efSearch = max(self._config.search_width, plain + under)
            _, columns_QC = self._index.search(query_QD, min(plain + under, len(ids_N)))
            rows_P, places_P = np.nonzero(columns_QC >= 0)
            columns_P = columns_QC[rows_P, places_P]
            scores_P = gathered_scores(query_QD, rows_P, self._document_ND, columns_P)
            best.add(rows_P, scores_P, ids_N[columns_P])
            if below is not None and ceiling_Q is not None:
                below_P = scores_P < ceiling_Q[rows_P]
                below.add(rows_P[below_P], scores_P[below_P], ids_N[columns_P[below_P]])
                above_Q += np.bincount(rows_P[~below_P], minlength=queries)
        return SearchResult(best, below, above_Q, np.full(queries, -np.inf), 0, len(ids_N))
