"""The vector cache: vectors of earlier runs by the hash of model, prompt, text and length.

    <cache>/<fingerprint of model, precision, stored type>/part-<xxh3 of its bytes>.parquet

A part has the columns key (16 bytes), vector and cut.

A row's key is a hash of (most tokens, prompt, text); `cut` is 1 where the text had more tokens than that (older parts
lack the column). A part is written once, whole, and named by the hash of its bytes. Reading checks the bytes; a part
that does not fit its name is reported, left out, and its texts are embedded again. Only finite vectors are stored. Many
small parts are merged into large ones (`cache_merge.py`).

Guarantee: a vector from the cache is the one that an earlier run computed, rounded to the stored type. Against a run
without the cache it differs by that rounding and by float noise (which texts shared its forward; about 1e-6 in fp32,
1e-2 in bf16).

Memory of a process: 24 bytes per cached row for the index, and the vectors of a few parts.
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

from nvembed.core import storage
from nvembed.core.parquet import read_where
from nvembed.core.vectors import shard_content, table_matrix, vector_table
from nvembed.retrieval.cache_merge import Section, list_parts, merge_small, part_name, read_part, readers, sections
from nvembed.types import VectorType

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
KEY_BYTES = 16
_OPEN_PARTS = 8
UNKNOWN = -1  # it is not recorded whether a text was cut


def row_key(text: str, prompt: str, max_length: int) -> bytes:
    """The 16-byte key of a text under a prompt and a cut."""
    head = f"{max_length}:{len(prompt)}:{prompt}"
    return hashlib.blake2b((head + text).encode("utf-8"), digest_size=KEY_BYTES).digest()


def fingerprint(model: str, precision: str, kind: VectorType) -> str:
    """Name of the directory of one model's vectors in one precision and stored type.

    Args:
        model: hash of the model's files and settings.
    """
    parts = {"model": model, "precision": precision, "kind": kind, "format": FORMAT_VERSION}
    return storage.hash_json(parts)[:32]


def parts_at_start(cache_uri: str, fingerprints: Sequence[str], note_uri: str, work: str) -> dict[str, list[str]]:
    """Parts by fingerprint as they were when a piece of work first started.

    Vectors that a killed run added were batched differently from those of an uninterrupted run; with them the bytes of
    a restart would depend on the moment of the kill.

    Args:
        fingerprints: the directories to list.
        note_uri: file in which the first start records them.
        work: hash of the work; other work at the same place starts anew.
    """
    started = storage.hash_json({"work": work, "cache": cache_uri, "found": list(fingerprints)})
    if storage.exists(note_uri):
        noted = storage.read_json(note_uri)
        if noted.get("started") == started:
            parts: dict[str, list[str]] = noted["parts"]
            return parts
    parts = {name: list_parts(storage.join(cache_uri, name)) for name in fingerprints}
    storage.write_json(note_uri, {"started": started, "parts": parts})
    return parts


def remove_damaged(part_uri: str) -> None:
    """Delete a part whose bytes do not fit its name."""
    if storage.exists(part_uri) and not part_uri.endswith(f"/{part_name(storage.read_bytes(part_uri))}"):
        storage.remove(part_uri)


class VectorCache:
    """The vectors of one fingerprint that were stored when it was opened.

    Args:
        cache_uri: directory of the whole cache.
        fingerprint_name: see `fingerprint`.
        kind: how its vectors are stored.
        parts: the parts to look in; None for all that are there.

    Attributes:
        damaged: names of parts that could not be read.
    """

    def __init__(
        self, cache_uri: str, fingerprint_name: str, kind: VectorType, parts: Sequence[str] | None = None
    ) -> None:
        self._uri, self._kind = storage.join(cache_uri, fingerprint_name), kind
        self._parts = list(list_parts(self._uri) if parts is None else parts)
        self._merged: dict[str, Section] | None = None  # read when a part is gone
        self._lock = Lock()
        self.damaged: list[str] = []
        self._open_parts: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()
        with readers(self._uri) as pool:
            keys = list(pool.map(self._read_keys, range(len(self._parts))))
        self.damaged.sort()
        places: list[np.ndarray] = []
        for number, part_keys in enumerate(keys):
            rows = np.arange(len(part_keys))
            places.append(np.stack([np.full_like(rows, number), rows], axis=1).astype(np.int32))
        # Of a row in several parts the first counts; names are sorted, so every process takes the same.
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
        """Positions in `keys` of cached rows -> float32 [D], and whether the text was cut (1, 0, `UNKNOWN`)."""
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
        cached: dict[int, tuple[np.ndarray, int]] = {}
        for part, pairs in sorted(by_part.items()):
            loaded = self._load(part)
            if loaded is None:
                continue
            part_keys, matrix_ND, cut_N = loaded
            for position, place in pairs:
                if (part_keys[place] == wanted_K2[position]).all():
                    cached[position] = matrix_ND[place], int(cut_N[place])
        return cached

    def add(self, keys: Sequence[bytes], matrix_ND: np.ndarray, cut_N: np.ndarray) -> None:
        """Publish rows as one part; `find` of this object does not see it.

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
        """Merge many small parts into large ones; called when nothing more is added."""
        merge_small(self._uri)

    def _read_keys(self, number: int) -> np.ndarray:
        """uint64 [R, 2] of a part; none where it cannot be read."""
        try:
            return _key_numbers(self._rows_of(number, self._only_keys))
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            self._report(number, error)
            return np.empty((0, 2), dtype=np.uint64)

    def _load(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Keys, float32 vectors and `cut` of a part; None where its bytes do not fit its name."""
        if number in self._open_parts:
            self._open_parts.move_to_end(number)
            return self._open_parts[number]
        name = self._parts[number]
        if name in self.damaged:
            return None
        try:
            table = self._rows_of(number, lambda part: read_part(self._uri, part))
            self._open_parts[number] = _key_numbers(table), table_matrix(table), _cut(table)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            self._report(number, error)
            return None
        while len(self._open_parts) > _OPEN_PARTS:
            self._open_parts.popitem(last=False)
        return self._open_parts[number]

    def _only_keys(self, name: str) -> pa.Table:
        return read_where(storage.join(self._uri, name), None, ["key"], check_pages=True)

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
                section = self._section(name, again)
                if section is not None:
                    with suppress(FileNotFoundError):
                        return read(section[0]).slice(*section[1:])
            raise

    def _section(self, name: str, again: bool) -> Section | None:
        with self._lock:
            if self._merged is None or again:
                self._merged = sections(self._uri)
            return self._merged.get(name)

    def _report(self, number: int, error: Exception) -> None:
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
