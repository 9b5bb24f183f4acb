"""Vectors of earlier runs, found again by what they were made from.

    <cache>/<fingerprint of model, precision, stored type>/part-<xxh3 of its bytes>.parquet

A part has the columns key (16 bytes), vector and cut.

A row's key is a hash of (most tokens, what the model puts before the text, text); `cut` says whether the text had more
tokens than that (older parts do not). A part is written once, whole, under
a name that its bytes decide; reading checks them, and a part that does not fit its name is left out, told and computed
anew. Nothing but finite vectors is kept. Many small parts become large ones (`cache_merge.py`).

What is promised: a vector from the cache is the one that an earlier run computed, rounded to the stored type. Against
a run without the cache it differs by that rounding and by float noise (which texts shared its forward; about 1e-6 in
fp32, 1e-2 in bf16).

A process holds 24 bytes per cached row to find them, and a few parts' vectors.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nvembed.core import storage
from nvembed.core.vectors import shard_content, table_matrix, vector_table
from nvembed.retrieval.cache_merge import Section, list_parts, merge_small, part_name, read_part, readers, sections
from nvembed.types import VectorType

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
KEY_BYTES = 16
_HELD_PARTS = 8
UNKNOWN = -1  # whether a text was cut


def row_key(text: str, prefix: str, max_length: int) -> bytes:
    """The 16 bytes that name a text under an instruction and a cut."""
    head = f"{max_length}:{len(prefix)}:{prefix}"
    return hashlib.blake2b((head + text).encode("utf-8"), digest_size=KEY_BYTES).digest()


def fingerprint(model: str, precision: str, kind: VectorType) -> str:
    """Directory of the vectors of one model (the hash of its files and settings) in one arithmetic and stored type."""
    parts = {"model": model, "precision": precision, "kind": kind, "format": FORMAT_VERSION}
    return storage.hash_json(parts)[:32]


def parts_at_start(cache_uri: str, found: Sequence[str], note_uri: str, work: str) -> dict[str, list[str]]:
    """Parts by fingerprint as they were when a piece of work first started.

    A restart that looked in what the killed run had added would take vectors from there that the killed run computed
    in other company; its bytes would depend on when the kill came.

    Args:
        found: the fingerprints to list.
        note_uri: where the first start writes them down.
        work: hash of the work; other work at the same place starts anew.
    """
    started = storage.hash_json({"work": work, "cache": cache_uri, "found": list(found)})
    if storage.exists(note_uri):
        noted = storage.read_json(note_uri)
        if noted.get("started") == started:
            parts: dict[str, list[str]] = noted["parts"]
            return parts
    parts = {name: list_parts(storage.join(cache_uri, name)) for name in found}
    storage.write_json(note_uri, {"started": started, "parts": parts})
    return parts


def remove_damaged(part_uri: str) -> None:
    """Delete a part that does not fit its name; one that was computed again under the same name stays."""
    if storage.exists(part_uri) and not part_uri.endswith(f"/{part_name(storage.read_bytes(part_uri))}"):
        storage.remove(part_uri)


class VectorCache:
    """The vectors of one fingerprint, as they stood when it was opened.

    Args:
        cache_uri: directory of the whole cache.
        found: see `fingerprint`.
        kind: how its vectors are stored.
        parts: the parts to look in; None for all that are there.

    Attributes:
        damaged: names of parts that could not be read.
    """

    def __init__(self, cache_uri: str, found: str, kind: VectorType, parts: Sequence[str] | None = None) -> None:
        self._uri, self._kind = storage.join(cache_uri, found), kind
        self._parts = list(list_parts(self._uri) if parts is None else parts)
        self._merged: dict[str, Section] | None = None  # read when a part is gone
        self._lock = Lock()
        self.damaged: list[str] = []
        self._held: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()
        with readers(self._uri) as pool:
            keys = list(pool.map(self._read_keys, range(len(self._parts))))
        self.damaged.sort()
        places: list[np.ndarray] = []
        for number, part_keys in enumerate(keys):
            rows = np.arange(len(part_keys))
            places.append(np.stack([np.full_like(rows, number), rows], axis=1).astype(np.int32))
        # Of a row that stands in several parts the first counts; names are sorted, so every process takes the same.
        key_R2 = np.concatenate(keys) if keys else np.empty((0, 2), dtype=np.uint64)
        order = np.lexsort((key_R2[:, 1], key_R2[:, 0]))
        self._key_R2 = key_R2[order]
        self._place_R2 = np.concatenate(places)[order] if places else np.empty((0, 2), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._key_R2)

    def damaged_uris(self) -> list[str]:
        """Where the damaged parts lie."""
        return [storage.join(self._uri, name) for name in self.damaged]

    def find(self, keys: Sequence[bytes]) -> dict[int, tuple[np.ndarray, int]]:
        """Positions in `keys` that the cache has -> float32 [D], and whether the text was cut (1, 0, `UNKNOWN`)."""
        if not len(self) or not keys:
            return {}
        wanted_K2 = _numbers(b"".join(keys))
        starts = np.searchsorted(self._key_R2[:, 0], wanted_K2[:, 0])
        by_part: dict[int, list[tuple[int, int]]] = {}
        for position, start in enumerate(starts):
            row = int(start)
            while row < len(self) and self._key_R2[row, 0] == wanted_K2[position, 0]:
                if self._key_R2[row, 1] == wanted_K2[position, 1]:
                    part, place = self._place_R2[row]
                    by_part.setdefault(int(part), []).append((position, int(place)))
                    break
                row += 1
        found: dict[int, tuple[np.ndarray, int]] = {}
        for part, pairs in sorted(by_part.items()):
            loaded = self._load(part)
            if loaded is None:
                continue
            part_keys, matrix_ND, cut_N = loaded
            for position, place in pairs:
                if (part_keys[place] == wanted_K2[position]).all():
                    found[position] = matrix_ND[place], int(cut_N[place])
        return found

    def add(self, keys: Sequence[bytes], matrix_ND: np.ndarray, cut_N: np.ndarray) -> None:
        """Publish rows as one part; this object does not look in it.

        Args:
            cut_N: int8, whether each text was cut; see `find`.
        """
        if not keys:
            return
        table = vector_table(pa.array(keys, pa.binary(KEY_BYTES)), matrix_ND, self._kind)
        table = table.append_column("cut", pa.array(cut_N, pa.int8()))
        data = shard_content(table, checksums=True)
        storage.write_bytes(storage.join(self._uri, part_name(data)), data)

    def settle(self) -> None:
        """To be called when nothing more is added: many small parts become large ones."""
        merge_small(self._uri)

    def _read_keys(self, number: int) -> np.ndarray:
        """uint64 [R, 2] of a part; none where it cannot be read."""
        try:
            return _key_numbers(self._rows_of(number, self._only_keys))
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            self._tell(number, error)
            return np.empty((0, 2), dtype=np.uint64)

    def _load(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Keys, float32 vectors and `cut` of a part whose bytes are those its name states."""
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        name = self._parts[number]
        if name in self.damaged:
            return None
        try:
            table = self._rows_of(number, lambda part: read_part(self._uri, part))
            self._held[number] = _key_numbers(table), table_matrix(table), _cut(table)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            self._tell(number, error)
            return None
        while len(self._held) > _HELD_PARTS:
            self._held.popitem(last=False)
        return self._held[number]

    def _only_keys(self, name: str) -> pa.Table:
        with storage.open_reader(storage.join(self._uri, name)) as file:
            return pq.read_table(file, columns=["key"], page_checksum_verification=True)

    def _rows_of(self, number: int, read: Callable[[str], pa.Table]) -> pa.Table:
        """A part, or its rows in the part that it was merged into since it was listed.

        Raises:
            FileNotFoundError: it is nowhere.
        """
        name = self._parts[number]
        try:
            return read(name)
        except FileNotFoundError:
            for again in (False, True):  # what was merged may be merged once more
                found = self._section(name, again)
                if found is not None:
                    with suppress(FileNotFoundError):
                        return read(found[0]).slice(*found[1:])
            raise

    def _section(self, name: str, again: bool) -> Section | None:
        with self._lock:
            if self._merged is None or again:
                self._merged = sections(self._uri)
            return self._merged.get(name)

    def _tell(self, number: int, error: Exception) -> None:
        name = self._parts[number]
        if name not in self.damaged:
            self.damaged.append(name)
            logger.warning("vector cache: %s cannot be used (%s); its texts are embedded again", name, error)


def _key_numbers(table: pa.Table) -> np.ndarray:
    column = table.column("key").combine_chunks()
    if column.type != pa.binary(KEY_BYTES):
        raise ValueError(f"its keys are {column.type}")
    return _numbers(b"".join(column.to_pylist()))


def _cut(table: pa.Table) -> np.ndarray:
    if "cut" not in table.schema.names:
        return np.full(table.num_rows, UNKNOWN, dtype=np.int8)
    return np.asarray(table.column("cut"))


def _numbers(data: bytes) -> np.ndarray:
    """uint64 [K, 2] of K keys."""
    return np.frombuffer(data, dtype=">u8").astype(np.uint64).reshape(-1, 2)
