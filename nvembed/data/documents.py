"""The documents of a data set while it is prepared: texts in an Arrow IPC file on disk, decisions about them in arrays.

The file (in `TMPDIR`) has no name, so nothing is left behind however the process ends, and is read back through the
page cache, memory-mapped; a document costs some arrays' entries of memory (its place, hashes, split).
"""

from __future__ import annotations

import mmap
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.data.tables import CORPUS_SCHEMA, SPLITS, Document, document_text
from nvembed.text.identity import document_digest

SPLIT_CODES = (None, *SPLITS)  # a document's `split` by its code in `Documents.split_N`
_ID_ROWS = 1 << 19
_BATCH_ROWS = 1 << 16  # of a record batch
_BLOCK_ROWS = 1 << 14  # read at a time
_CHARACTERS = 1 << 25  # of a record batch and of what is read at a time; a text has a million at most
_STORED = pa.schema([field for field in CORPUS_SCHEMA if field.name != "split"])


class DocumentWriter:
    """Takes documents one at a time; memory is one record batch."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open until `close`
        self._batches = pa.ipc.new_file(self._file, _STORED)
        self._waiting: list[Document] = []
        self._characters = 0  # of the waiting ones
        self._length = array("i")
        self._splits = array("b")

    def add(self, document: Document) -> None:
        """Append one document.

        Raises:
            OSError: the temporary folder is full.
        """
        self._waiting.append(document)
        self._length.append(len(document.title) + len(document.text))
        self._characters += self._length[-1]
        self._splits.append(SPLIT_CODES.index(document.split))
        if len(self._waiting) == _BATCH_ROWS or self._characters >= _CHARACTERS:
            self._write()

    def _write(self) -> None:
        columns = [[getattr(row, name) for row in self._waiting] for name in _STORED.names]
        try:
            self._batches.write_batch(pa.record_batch(columns, schema=_STORED))
        except OSError as error:
            raise _placed(error) from error
        self._waiting, self._characters = [], 0

    def close(self) -> Documents:
        """All that was added, in that order."""
        if self._waiting:
            self._write()
        try:
            self._batches.close()
            self._file.flush()
        except OSError as error:
            raise _placed(error) from error
        data = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        store = _Store(data, np.array(self._length, np.int32))
        self._file.close()
        return Documents(store, np.arange(len(self._splits)), np.array(self._splits, np.int8))


def _placed(error: OSError) -> OSError:
    """The error with the folder it happened in, as a file without a name has none to report."""
    advice = "documents lie there while they are prepared; make room, or set TMPDIR to a folder of another disk"
    return OSError(error.errno, f"{error.strerror}: {tempfile.gettempdir()} ({advice})")


class _Store:
    """A memory-mapped IPC file; `Documents` are a choice of its rows.

    Attributes:
        length_R: int32 [R], characters of title and text of every row.
    """

    def __init__(self, data: mmap.mmap, length_R: np.ndarray) -> None:
        self.length_R = length_R
        reader = pa.ipc.open_file(pa.py_buffer(data))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def take(self, row_M: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Some rows, in that order. `pa.Table.take` would copy whole columns, as a take from chunks joins them first.

        Args:
            row_M: int64; few enough that a column of them stays below 2 GB.
        """
        number_M = np.searchsorted(self._starts, row_M, side="right") - 1
        order = np.argsort(number_M, kind="stable")
        numbers, begins = np.unique(number_M[order], return_index=True)
        pieces = [
            self._batches[number].select(columns).take(pa.array(row_M[places] - self._starts[number]))
            for number, places in zip(numbers.tolist(), np.split(order, begins[1:]), strict=False)  # of none, one
        ]
        schema = pa.schema([_STORED.field(name) for name in columns])
        table = pa.Table.from_batches(pieces, schema).combine_chunks()
        if len(pieces) <= 1:
            return table
        place_M = np.empty(len(order), np.int64)
        place_M[order] = np.arange(len(order))
        return table.take(pa.array(place_M))


class Documents:
    """Documents in some order; iterating gives `Document`s.

    Attributes:
        split_N: int8 [N], each one's `split` as its place in `SPLIT_CODES`.
    """

    def __init__(self, store: _Store, rows: np.ndarray, split_N: np.ndarray) -> None:
        self._store, self._rows, self.split_N = store, rows, split_N

    @staticmethod
    def of(documents: Iterable[Document]) -> Documents:
        """Documents written one after the other."""
        writer = DocumentWriter()
        for document in documents:
            writer.add(document)
        return writer.close()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Document]:
        for table in self.tables():
            yield from map(Document, *(table.column(name).to_pylist() for name in CORPUS_SCHEMA.names))

    def tables(self, rows: int = _BLOCK_ROWS) -> Iterator[pa.Table]:
        """The documents as tables of `rows` rows (`CORPUS_SCHEMA`), their columns in chunks."""
        for start in range(0, len(self), rows):
            yield pa.concat_tables(map(self._table, self._blocks(start, min(start + rows, len(self)))))

    def _blocks(self, start: int, stop: int) -> Iterator[slice]:
        """Places from `start` to `stop` in pieces that can be read at once."""
        end_N = np.cumsum(self._store.length_R[self._rows[start:stop]], dtype=np.int64)
        first = 0
        while first < len(end_N):
            before = int(end_N[first - 1]) if first else 0
            fitting = int(np.searchsorted(end_N, before + _CHARACTERS, side="right"))
            last = min(max(fitting, first + 1), first + _BLOCK_ROWS)
            yield slice(start + first, start + min(last, len(end_N)))
            first = last

    def _table(self, places: slice) -> pa.Table:
        split = pa.array(SPLIT_CODES, pa.string()).take(pa.array(self.split_N[places]))
        return self._store.take(self._rows[places], _STORED.names).append_column(CORPUS_SCHEMA.field("split"), split)

    def taken(self, chosen_N: np.ndarray) -> Documents:
        """Some of the documents: by a mask bool [N], or by places int64 [M] in a new order."""
        return Documents(self._store, self._rows[chosen_N], self.split_N[chosen_N])

    def with_splits(self, split_N: np.ndarray) -> Documents:
        """The same documents in other splits, int8 [N] (`SPLIT_CODES`)."""
        return Documents(self._store, self._rows, split_N.astype(np.int8))

    # -- ids ----------------------------------------------------------------------------------------------------------

    def ids(self, places_M: np.ndarray | None = None) -> Iterator[str]:
        """Ids of all documents, or of those at some places."""
        rows = self._rows if places_M is None else self._rows[places_M]
        return chain.from_iterable(chunk.to_pylist() for chunk in self._ids(rows))

    def _ids(self, row_M: np.ndarray) -> Iterator[pa.ChunkedArray]:
        """Ids of rows of the store, `_ID_ROWS` at a time."""
        for start in range(0, len(row_M), _ID_ROWS):
            yield self._store.take(row_M[start : start + _ID_ROWS], ["id"]).column("id")

    def id_order(self) -> np.ndarray:
        """int64 [N]: places in the order of their ids; equal ids in the order they have."""
        chunks = [chunk for column in self._ids(self._rows) for chunk in column.chunks]
        return pc.sort_indices(pa.chunked_array(chunks, pa.string())).to_numpy().astype(np.int64)

    def repeated(self) -> np.ndarray:
        """bool [N]: documents whose id an earlier document has."""
        order = self.id_order()
        again = np.zeros(len(self), bool)
        for start in range(1, len(self), _ID_ROWS):
            places = order[start - 1 : start + _ID_ROWS]
            ids = self._store.take(self._rows[places], ["id"]).column("id")
            again[places[1:]] = pc.equal(ids[1:], ids[:-1]).to_numpy()
        return again

    def places(self, ids: Iterable[str]) -> dict[str, int]:
        """Place of each of the ids that is there."""
        wanted = sorted(set(ids))
        values = pa.array(wanted, pa.string())
        places: dict[str, int] = {}
        for number, column in enumerate(self._ids(self._rows) if wanted else ()):
            index = pc.index_in(column, value_set=values).combine_chunks()
            hit = np.flatnonzero(index.is_valid().to_numpy(zero_copy_only=False))
            keys = (wanted[place] for place in index.take(pa.array(hit)).to_pylist())
            places.update(zip(keys, (number * _ID_ROWS + hit).tolist(), strict=True))
        return places

    def mask(self, ids: Iterable[str]) -> np.ndarray:
        """bool [N]: the documents with these ids."""
        mask = np.zeros(len(self), bool)
        mask[list(self.places(ids).values())] = True
        return mask

    # -- texts --------------------------------------------------------------------------------------------------------

    def texts(self) -> Iterator[str]:
        """The embedded text of each document (`document_text`)."""
        for table in self.tables():
            yield from map(document_text, table.column("title").to_pylist(), table.column("text").to_pylist())

    def texts_of(self, ids: Iterable[str]) -> dict[str, str]:
        """The embedded texts of some documents, by id."""
        places = self.places(ids)
        return dict(zip(places, self.taken(np.array(list(places.values()), np.int64)).texts(), strict=True))

    def digests(self) -> np.ndarray:
        """uint64 [N, 2]: equal where title and text are (128-bit xxh3)."""
        digest_N2 = np.empty((len(self), 2), np.uint64)
        place = 0
        for table in self.tables():
            titles, texts = (table.column(name).to_pylist() for name in ("title", "text"))
            packed = b"".join(map(document_digest, titles, texts))
            digest_N2[place : place + len(texts)] = np.frombuffer(packed, np.uint64).reshape(-1, 2)
            place += len(texts)
        return digest_N2

    def lengths(self) -> np.ndarray:
        """int64 [N]: characters of the embedded texts."""
        return np.fromiter(map(len, self.texts()), np.int64, len(self))


def split_codes(splits: Sequence[str | None]) -> np.ndarray:
    """int8 codes of splits (`SPLIT_CODES`)."""
    return np.array([SPLIT_CODES.index(split) for split in splits], np.int8)
