"""Rows of large tables for many shards of a stream, each table read once however many shards there are.

The keys that the shards need are sorted; then one task per part of a table reads that part and writes the
requested rows by shard:

    requests.parquet      (key, shard), sorted
    rows/part-*           of one part of the table: the requested rows, one row group per shard

A shard then reads its row group of each part. Memory of a task is the requested rows of its part, memory of the caller
the keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nvembed.core import storage
from nvembed.core.parquet import (
    group_rows,
    matching_rows,
    open_parquet,
    part_uri,
    read_schema,
    read_where,
    write_table,
    write_tables,
)
from nvembed.core.ray_tasks import run_tasks
from nvembed.core.retry import retried

PART_ROWS = 1 << 20
MAX_PARTS = 64  # a shard opens each of them
_PARTS = "parts.json"

_REQUESTS = pa.schema([("key", pa.large_string()), ("shard", pa.int32())])


@dataclass(frozen=True)
class Gather:
    """One table to gather from.

    Attributes:
        uri: working folder.
        tables: parquet files that together are the table; a key occurs in it once.
        key: its column of keys.
        columns: what is wanted beside the key.
    """

    uri: str
    tables: tuple[str, ...]
    key: str
    columns: tuple[str, ...]

    def run(self, keys_of_shards: Iterable[Iterable[str]]) -> None:
        """Gather the rows of every shard.

        Args:
            keys_of_shards: the keys each shard wants, the first shard's first. A key that the table lacks gives no row.
        """
        keys = [pa.array(sorted(set(wanted)), pa.large_string()) for wanted in keys_of_shards]
        whose = np.repeat(np.arange(len(keys), dtype=np.int32), [len(column) for column in keys])
        requests = pa.table([pa.chunked_array(keys, pa.large_string()), whose], schema=_REQUESTS)
        write_table(requests.sort_by([("key", "ascending"), ("shard", "ascending")]), self._requests)
        parts = self._parts()
        storage.write_json(storage.join(self.uri, _PARTS), {"parts": len(parts)})
        run_tasks(functools.partial(_gather_part, self, parts), len(parts), self.uri, "parts of a table")

    def rows(self, shard: int) -> pa.Table:
        """The rows of a shard, in the order of the table; text columns are `large_string`."""
        parts = storage.read_json(storage.join(self.uri, _PARTS))["parts"]
        mine, names = pc.field("shard") == shard, self.schema().names
        return pa.concat_tables([read_where(part_uri(self.uri, "rows", part), mine, names) for part in range(parts)])

    def schema(self) -> pa.Schema:
        """Columns of the rows; text columns are `large_string`, of which a part may have more than 2 GB."""
        stored = read_schema(self.tables[0])
        fields = [stored.field(name) for name in (self.key, *self.columns)]
        return pa.schema(
            [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in fields]
        )

    @property
    def _requests(self) -> str:
        return storage.join(self.uri, "requests.parquet")

    def _parts(self) -> list[list[tuple[str, list[int]]]]:
        """Row groups of each part, by file: contiguous, of about the same number of rows."""
        groups = [(uri, group, rows) for uri in self.tables for group, rows in enumerate(group_rows(uri))]
        end_G = np.cumsum([rows for _, _, rows in groups]) if groups else np.zeros(0, np.int64)
        count = min(MAX_PARTS, max(1, -(-int(end_G[-1]) // PART_ROWS))) if groups else 1
        parts: list[dict[str, list[int]]] = [{} for _ in range(count)]
        for (uri, group, rows), end in zip(groups, end_G.tolist(), strict=True):
            place = min((end - rows) * count // max(int(end_G[-1]), 1), count - 1)  # empty groups stand at the end
            parts[place].setdefault(uri, []).append(group)
        return [list(part.items()) for part in parts]


@retried
def _gather_part(gather: Gather, parts: Sequence[list[tuple[str, list[int]]]], part: int) -> None:
    """The requested rows of one part, by shard."""
    schema = gather.schema()
    tables, requests = [schema.empty_table()], [_REQUESTS.empty_table()]
    for uri, groups in parts[part]:
        with open_parquet(uri) as file:
            here = _requests_between(gather._requests, _bounds(file, groups, gather.key))
            keys = pc.unique(here.column("key"))
            tables += [
                rows.cast(schema)
                for rows in matching_rows(file, gather.key, keys, (gather.key, *gather.columns), groups)
            ]
            requests.append(here)
    rows, whose = pa.concat_tables(tables), pa.concat_tables(requests).group_by(["key", "shard"]).aggregate([])
    with_shard = pa.schema([_REQUESTS.field("shard"), *schema])
    write_tables(lambda: _by_shard(rows, whose, gather.key, with_shard), with_shard, part_uri(gather.uri, "rows", part))


def _bounds(file: pq.ParquetFile, groups: Sequence[int], key: str) -> tuple[str, str] | None:
    """Smallest and largest key of row groups, where they have statistics: where a table is sorted by its key, each
    part needs few of the requests."""
    names = [file.schema.column(place).path for place in range(len(file.schema))]  # nested columns have several
    column = names.index(key)
    lowest, highest = [], []
    for group in groups:
        statistics = file.metadata.row_group(group).column(column).statistics
        if statistics is None or not statistics.has_min_max:
            return None
        lowest.append(statistics.min)
        highest.append(statistics.max)
    return (min(lowest), max(highest)) if lowest else None


def _requests_between(uri: str, bounds: tuple[str, str] | None) -> pa.Table:
    key = pc.field("key")
    between = None if bounds is None else (key >= bounds[0]) & (key <= bounds[1])
    return read_where(uri, between).cast(_REQUESTS)


def _by_shard(rows: pa.Table, requests: pa.Table, key: str, schema: pa.Schema) -> Iterator[pa.Table]:
    """One table per shard that has a row, in the order of the shards; inside, in the order of the rows."""
    index = pc.index_in(requests.column("key"), value_set=rows.column(key).combine_chunks())
    hit = index.is_valid().to_numpy()
    shard_F = requests.column("shard").to_numpy()[hit]
    row_F = index.drop_null().to_numpy().astype(np.int64)
    order = np.lexsort((row_F, shard_F))
    shard_F, row_F = shard_F[order], row_F[order]
    shards, starts = np.unique(shard_F, return_index=True)
    for shard, places in zip(shards, np.split(row_F, starts[1:]), strict=False):  # of none, split gives one
        chosen = rows.take(pa.array(places))
        yield chosen.add_column(0, schema.field("shard"), pa.array(np.full(chosen.num_rows, shard, np.int32)))
