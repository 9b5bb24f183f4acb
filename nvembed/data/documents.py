"""The documents of a data set while it is prepared: texts on disk, some 80 bytes of memory a document.

Text goes to temporary files (of `TMPDIR`), which have no name, so nothing is left behind however the process ends, and
is read back through the page cache. What is decided about documents is decided over arrays of their places.
"""

from __future__ import annotations

import mmap
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.data.tables import CORPUS_SCHEMA, SPLITS, Document, document_text
from nvembed.text.identity import document_digest

SIDES = (None, *SPLITS)  # a document's `split` by its code in `Documents.side_N`
_TEXT_ROWS = 1024  # at most a megabyte each (`text/checks.py`), so that a column of them stays below 2 GB
_ID_ROWS = 1 << 19


class _Column:
    """One column of text, written to a file row by row."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open until `close`
        self._offsets = array("q", [0])

    def add(self, text: str) -> None:
        try:
            self._offsets.append(self._offsets[-1] + self._file.write(text.encode()))
        except OSError as error:
            raise _placed(error) from error

    def close(self) -> pa.Array:
        """The column as Arrow, its bytes memory-mapped."""
        try:
            self._file.flush()
        except OSError as error:
            raise _placed(error) from error
        data = b""
        if self._offsets[-1]:
            data = mmap.mmap(self._file.fileno(), self._offsets[-1], access=mmap.ACCESS_READ)  # type: ignore[assignment]
        self._file.close()
        buffers = [None, pa.py_buffer(self._offsets), pa.py_buffer(data)]
        return pa.Array.from_buffers(pa.large_string(), len(self._offsets) - 1, buffers)


def _placed(error: OSError) -> OSError:
    """The error with the folder it happened in, which a file without a name does not tell."""
    advice = "documents lie there while they are prepared; make room, or set TMPDIR to a folder of another disk"
    return OSError(error.errno, f"{error.strerror}: {tempfile.gettempdir()} ({advice})")


@dataclass(frozen=True)
class _Store:
    """Columns as they were written; `Documents` are a choice of their rows."""

    id: pa.Array
    title: pa.Array
    text: pa.Array
    labels: pa.Array
    label_N: np.ndarray


@dataclass
class DocumentWriter:
    """Takes documents one at a time."""

    _id: _Column = field(default_factory=_Column)
    _title: _Column = field(default_factory=_Column)
    _text: _Column = field(default_factory=_Column)
    _labels: dict[str | None, int] = field(default_factory=dict)
    _label: array[int] = field(default_factory=lambda: array("i"))
    _side: array[int] = field(default_factory=lambda: array("b"))

    def add(self, document: Document) -> None:
        """Append one document.

        Raises:
            OSError: the temporary folder is full.
        """
        self._id.add(document.id)
        self._title.add(document.title)
        self._text.add(document.text)
        self._label.append(self._labels.setdefault(document.label, len(self._labels)))
        self._side.append(SIDES.index(document.split))

    def close(self) -> Documents:
        """All that was added, in that order."""
        labels = pa.array(list(self._labels), pa.string())
        store = _Store(
            self._id.close(), self._title.close(), self._text.close(), labels, np.array(self._label, np.int32)
        )
        return Documents(store, np.arange(len(store.id)), np.array(self._side, np.int8))


class Documents:
    """Documents in some order; iterating gives `Document`s.

    Attributes:
        side_N: int8 [N], each one's `split` as its place in `SIDES`.
    """

    def __init__(self, store: _Store, rows: np.ndarray, side_N: np.ndarray) -> None:
        self._store, self._rows, self.side_N = store, rows, side_N

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

    def tables(self, rows: int = _TEXT_ROWS) -> Iterator[pa.Table]:
        """The documents as tables of `rows` rows (`CORPUS_SCHEMA`), their columns in chunks."""
        for start in range(0, len(self), rows):
            places = range(start, min(start + rows, len(self)), _TEXT_ROWS)
            yield pa.concat_tables(
                [self._table(slice(place, min(place + _TEXT_ROWS, start + rows))) for place in places]
            )

    def _table(self, places: slice) -> pa.Table:
        store, rows = self._store, pa.array(self._rows[places])
        side = pa.array(SIDES, pa.string()).take(pa.array(self.side_N[places]))
        label = store.labels.take(pa.array(store.label_N[self._rows[places]]))
        texts = [column.take(rows).cast(pa.string()) for column in (store.id, store.title, store.text)]
        return pa.table([*texts, label, side], schema=CORPUS_SCHEMA)

    def taken(self, chosen_N: np.ndarray) -> Documents:
        """Some of the documents: by a mask bool [N], or by places int64 [M] in a new order."""
        return Documents(self._store, self._rows[chosen_N], self.side_N[chosen_N])

    def on_sides(self, side_N: np.ndarray) -> Documents:
        """The same documents with other sides, int8 [N] (`SIDES`)."""
        return Documents(self._store, self._rows, side_N.astype(np.int8))

    # -- ids ----------------------------------------------------------------------------------------------------------

    def ids(self, places_M: np.ndarray | None = None) -> Iterator[str]:
        """Ids of all documents, or of those at some places."""
        rows = self._rows if places_M is None else self._rows[places_M]
        blocks = (rows[start : start + _ID_ROWS] for start in range(0, len(rows), _ID_ROWS))
        return chain.from_iterable(self._store.id.take(pa.array(block)).to_pylist() for block in blocks)

    def id_order(self) -> np.ndarray:
        """int64 [N]: places in the order of their ids; equal ids in the order they have."""
        return pc.sort_indices(self._store.id.take(pa.array(self._rows))).to_numpy().astype(np.int64)

    def repeated(self) -> np.ndarray:
        """bool [N]: documents whose id stands before, too."""
        order = self.id_order()
        again = np.zeros(len(self), bool)
        for start in range(1, len(self), _ID_ROWS):
            places = order[start - 1 : start + _ID_ROWS]
            ids = self._store.id.take(pa.array(self._rows[places]))
            again[places[1:]] = pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
        return again

    def places(self, ids: Iterable[str]) -> dict[str, int]:
        """Place of each of the ids that is there."""
        wanted = sorted(set(ids))
        values = pa.array(wanted, pa.large_string())
        found: dict[str, int] = {}
        for start in range(0, len(self) if wanted else 0, _ID_ROWS):
            index = pc.index_in(self._store.id.take(pa.array(self._rows[start : start + _ID_ROWS])), value_set=values)
            hit = np.flatnonzero(index.is_valid().to_numpy(zero_copy_only=False))
            keys = (wanted[number] for number in index.take(pa.array(hit)).to_pylist())
            found.update(zip(keys, (start + hit).tolist(), strict=True))
        return found

    def mask(self, ids: Iterable[str]) -> np.ndarray:
        """bool [N]: the documents with these ids."""
        mask = np.zeros(len(self), bool)
        mask[list(self.places(ids).values())] = True
        return mask

    # -- texts --------------------------------------------------------------------------------------------------------

    def texts(self) -> Iterator[str]:
        """What is embedded of each document (`document_text`)."""
        for table in self.tables():
            yield from map(document_text, table.column("title").to_pylist(), table.column("text").to_pylist())

    def texts_of(self, ids: Iterable[str]) -> dict[str, str]:
        """What is embedded of some documents, by id."""
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
        """int64 [N]: characters of what is embedded."""
        return np.fromiter(map(len, self.texts()), np.int64, len(self))


def sides_of(splits: Sequence[str | None]) -> np.ndarray:
    """int8 codes of splits (`SIDES`)."""
    return np.array([SIDES.index(split) for split in splits], np.int8)
