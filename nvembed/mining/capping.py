"""The cap on documents: which candidates of a whole data set stay when no document may serve more than so many queries.

It needs all candidates of the data set at once: as arrays, some 80 bytes each (`rules.cap_documents` included).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core.parquet import read_table
from nvembed.mining.config import MineConfig
from nvembed.mining.lists import flat, owners, scored_array, starts
from nvembed.mining.mined import MINED_SCHEMA
from nvembed.mining.rules import FREE, cap_documents


def capped(uris: Sequence[str], config: MineConfig) -> list[np.ndarray]:
    """Which negatives of each part stay; given ones do, whatever the cap.

    Candidates are those that were searched: a query that loses too many of them is left with fewer negatives.

    Args:
        uris: parts of one data set (`MINED_SCHEMA`) with all candidates that qualify.

    Returns:
        bool over the flat negatives of each part.
    """
    assert config.max_per_document is not None
    lengths, given, scores, documents, examples = [], [], [], [], []
    for uri in uris:
        table = read_table(uri, ["example_id", "negatives"])
        start_Q, values = flat(table.column("negatives"))
        given_P = np.asarray(values.field("score").is_null())
        lengths.append(np.diff(start_Q))
        given.append(given_P)
        scores.append(np.asarray(values.field("score").drop_null()))
        documents.append(values.field("id").filter(pa.array(~given_P)).dictionary_encode())
        examples += table.column("example_id").chunks
    start_Q, given_P = starts(np.concatenate(lengths)), np.concatenate(given)
    mined_P = np.flatnonzero(~given_P)
    owner_M = owners(start_Q)[mined_P]
    first_Q = starts(np.bincount(owner_M, minlength=len(start_Q) - 1))
    column_M = np.arange(len(owner_M)) - first_Q[owner_M]
    shape = len(first_Q) - 1, int(np.diff(first_Q).max(initial=0))
    documents_QC, scores_QC = np.full(shape, FREE, dtype=np.int64), np.full(shape, -np.inf)
    documents_QC[owner_M, column_M] = _codes(documents)
    scores_QC[owner_M, column_M] = np.concatenate(scores)
    order_Q = np.empty(shape[0], dtype=np.int64)
    order_Q[np.asarray(pc.sort_indices(pa.chunked_array(examples, pa.string())))] = np.arange(shape[0])
    column_QK = cap_documents(documents_QC, scores_QC, config.num_negatives, config.max_per_document, order_Q)
    row, place = np.nonzero(column_QK != FREE)
    stays_P = given_P
    stays_P[mined_P[first_Q[row] + column_QK[row, place]]] = True
    return _first(stays_P, start_Q, config.num_negatives, [len(part) for part in given])


def tables(uris: Sequence[str], stays: Sequence[np.ndarray]) -> Iterator[pa.Table]:
    """The parts with the negatives that stay (`MINED_SCHEMA`), one in memory at a time."""
    for uri, stays_P in zip(uris, stays, strict=True):
        table = read_table(uri).cast(MINED_SCHEMA)
        start_Q, values = flat(table.column("negatives"))
        kept = values.filter(pa.array(stays_P))
        count_Q = np.bincount(owners(start_Q)[stays_P], minlength=len(start_Q) - 1)
        negatives = scored_array(starts(count_Q), kept.field("id"), kept.field("score"))
        place = MINED_SCHEMA.get_field_index("negatives")
        yield table.set_column(place, MINED_SCHEMA.field(place), negatives)


def _codes(parts: Sequence[pa.DictionaryArray]) -> np.ndarray:
    """The same number for the same string in all parts, as int64."""
    whole = pa.chunked_array(parts).unify_dictionaries()
    return np.concatenate([np.asarray(chunk.indices).astype(np.int64) for chunk in whole.chunks])


def _first(stays_P: np.ndarray, start_Q: np.ndarray, count: int, lengths: Sequence[int]) -> list[np.ndarray]:
    """The first `count` of each query that stay, by part."""
    so_far_P = np.cumsum(stays_P)
    before_Q = np.concatenate([[0], so_far_P])[start_Q[:-1]]
    stays_P &= so_far_P - before_Q[owners(start_Q)] <= count
    return np.split(stays_P, np.cumsum(lengths)[:-1])
