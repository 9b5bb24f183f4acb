"""Texts that a model of the step could not embed: what is left of the queries and documents of a data set without them.

A document without a vector is nobody's negative and nobody's positive; an example whose query has none, or none of
whose own positives has one, is left out. `<dataset>/rejected.json` in the step's output names them (there is none where
nothing was rejected), so whoever selects again sees the same examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core import storage
from nvembed.mining.lists import flat, list_array, owners, starts

SIDES = ("queries", "documents")
NEEDED = ("key", "positives", "own")  # columns that decide which examples are left


@dataclass(frozen=True)
class Rejected:
    """Keys of a data set's texts that one of the models rejected."""

    queries: pa.Array
    documents: pa.Array

    @classmethod
    def of(cls, reasons: dict[str, dict[str, str]]) -> Rejected:
        """From key -> reason by side."""
        return cls(*(pa.array(sorted(reasons.get(side, {})), pa.string()) for side in SIDES))

    @classmethod
    def read(cls, root_uri: str, dataset: str) -> Rejected:
        """What a step's output tells."""
        uri = _uri(root_uri, dataset)
        return cls.of(storage.read_json(uri) if storage.exists(uri) else {})

    def __len__(self) -> int:
        return len(self.queries) + len(self.documents)

    def kept(self, queries: pa.Table) -> np.ndarray:
        """bool [Q]: examples that have a query and a positive of their own (columns `NEEDED`)."""
        return self._has_query(queries) & (self._own(queries)[1] > 0)

    def dropped(self, queries: pa.Table) -> dict[str, int]:
        """How many examples are left out, by reason."""
        has_query_Q = self._has_query(queries)
        counts = {
            "query_rejected": int((~has_query_Q).sum()),
            "positives_rejected": int((has_query_Q & (self._own(queries)[1] == 0)).sum()),
        }
        return {reason: count for reason, count in counts.items() if count}

    def without(self, queries: pa.Table) -> pa.Table:
        """The examples that are left, without the documents that were rejected (`never` stays as it is)."""
        here_P, own_Q = self._own(queries)
        columns = {name: queries.column(name) for name in queries.column_names}
        columns["positives"] = _filtered(queries.column("positives"), here_P)
        columns["own"] = pa.array(own_Q, pa.int32())
        if "given" in columns:
            given = flat(columns["given"])[1]
            columns["given"] = _filtered(columns["given"], ~_among(given, self.documents))
        return pa.table(columns).filter(pa.array(self.kept(queries)))

    def _has_query(self, queries: pa.Table) -> np.ndarray:
        return ~_among(queries.column("key"), self.queries)

    def _own(self, queries: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """(bool [P], int64 [Q]): positives that are there, and how many of each example's own are."""
        start_Q, ids = flat(queries.column("positives"))
        here_P = ~_among(ids, self.documents)
        owner_P = owners(start_Q)
        own_Q = queries.column("own").to_numpy().astype(np.int64)
        own_P = np.arange(len(owner_P)) - start_Q[owner_P] < own_Q[owner_P]
        return here_P, np.bincount(owner_P[own_P & here_P], minlength=len(own_Q))


def write_rejected(root_uri: str, dataset: str, reasons: dict[str, dict[str, str]]) -> None:
    """Name what was rejected (key -> reason by side) in a step's output; nothing where nothing was."""
    uri = _uri(root_uri, dataset)
    named = {side: dict(sorted(found.items())) for side, found in reasons.items() if found}
    if named:
        storage.write_json(uri, named)
    elif storage.exists(uri):
        storage.remove(uri)


def _uri(root_uri: str, dataset: str) -> str:
    return storage.join(root_uri, dataset, "rejected.json")


def _among(values: pa.Array | pa.ChunkedArray, keys: pa.Array) -> np.ndarray:
    return np.asarray(pc.is_in(values, value_set=keys)).astype(bool)


def _filtered(column: pa.ChunkedArray, keep_P: np.ndarray) -> pa.ListArray:
    start_Q, values = flat(column)
    count_Q = np.bincount(owners(start_Q)[keep_P], minlength=len(start_Q) - 1)
    return list_array(starts(count_Q), values.filter(pa.array(keep_P)))
