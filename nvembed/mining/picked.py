"""Some rows of a data set's shards by their key, read in one pass and kept in a temporary file.

What a group of queries may ask of its candidates (texts, second vectors) is some rows of nearly every shard: reading
the shards again for every few hundred queries would read the whole corpus as often. Memory is 16 bytes per picked key
and what is taken at a time.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core import storage
from nvembed.core.parquet import list_shards, read_table
from nvembed.core.retry import placed

_KEY = "key"


class Picked:
    """Rows picked from shards.

    Args:
        uri: directory of shards; a key stands in them once.
        wanted: keys (strings); one that is nowhere is not picked.
        columns: what is read beside the key.
    """

    def __init__(self, uri: str, wanted: pa.Array, columns: Sequence[str]) -> None:
        with placed(f"{tempfile.gettempdir()} (candidates lie there while they are checked; or set TMPDIR)"):
            parts = _spilled(_picked(storage.join(uri, name), wanted, columns) for name in list_shards(uri))
        self._table = pa.Table.from_batches(parts) if parts else None
        keys = self._table.column(_KEY) if self._table is not None else pa.chunked_array([], pa.string())
        # copied: index_in walks all of them, which should not read the file again
        self._keys = pa.array(keys.to_pylist(), pa.string())

    def __len__(self) -> int:
        return len(self._keys)

    def take(self, keys: Sequence[str]) -> pa.Table | None:
        """Rows of the keys that were picked, in the order of `keys`; None where nothing was picked at all."""
        if self._table is None:
            return None
        place = pc.index_in(pa.array(keys, pa.string()), value_set=self._keys)
        return self._table.take(place.drop_null())


def _spilled(tables: Iterable[pa.Table]) -> list[pa.RecordBatch]:
    """The tables through a file that has no name."""
    with tempfile.TemporaryFile() as file:
        writer = None
        for table in tables:
            if not table.num_rows:
                continue
            if writer is None:
                writer = pa.ipc.new_file(file, table.schema)
            writer.write_table(table)
        if writer is None:
            return []
        writer.close()
        file.flush()
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(data)))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def _picked(uri: str, wanted: pa.Array, columns: Sequence[str]) -> pa.Table:
    """Rows of one shard; only its keys are read where it has none of them. Text as `large_string`."""
    hit = pc.is_in(read_table(uri, [_KEY]).column(_KEY), value_set=wanted)
    if not pc.any(hit).as_py():
        return pa.table({_KEY: pa.array([], pa.string())})
    table = read_table(uri, [_KEY, *columns]).filter(hit)
    fields = [field.with_type(pa.large_string()) if _long(field) else field for field in table.schema]
    return table.cast(pa.schema(fields)).combine_chunks()


def _long(field: pa.Field) -> bool:
    return field.type == pa.string() and field.name != _KEY
