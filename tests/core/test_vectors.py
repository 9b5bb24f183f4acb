"""Shards: every row once, in order, cut by the rows alone; vectors as Arrow lists of fixed size."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.core.parquet import list_shards, read_table
from nvembed.core.vectors import (
    MIN_SHARDS,
    iter_vectors,
    read_vectors,
    table_matrix,
    vector_table,
    write_shard,
    write_text_shards,
)
from nvembed.types import UserError


def rows(count):
    return [(f"k{index}", f"text {index}", "") for index in range(count)]


@given(st.integers(0, 70), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_every_row_once_in_order_and_small_inputs_are_still_divided(tmp_path_factory, count, shard_rows):
    uri = str(tmp_path_factory.mktemp("shards"))
    assert write_text_shards(rows(count), uri, shard_rows) == count
    tables = [read_table(f"{uri}/{name}") for name in list_shards(uri)]
    assert [key for table in tables for key in table.column("key").to_pylist()] == [key for key, _, _ in rows(count)]
    sizes = [table.num_rows for table in tables]
    assert all(0 < size <= shard_rows for size in sizes)
    assert len(sizes) >= min(count, MIN_SHARDS)


def test_a_shorter_second_run_leaves_nothing_of_the_first(tmp_path):
    write_text_shards(rows(100), str(tmp_path), 5)
    write_text_shards(rows(10), str(tmp_path), 5)
    assert sum(read_table(f"{tmp_path}/{name}").num_rows for name in list_shards(str(tmp_path))) == 10


def test_vectors_are_fixed_size_lists_and_come_back_bit_equal(tmp_path):
    matrix = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    for number in range(2):
        write_shard(vector_table(pa.array(list("abcde")), matrix + number), f"{tmp_path}/part-0000{number}.parquet")
    kind = pq.read_schema(tmp_path / "part-00000.parquet").field("vector").type
    assert pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32() and kind.list_size == 3
    keys, result = read_vectors(str(tmp_path))
    assert keys == list("abcdeabcde")
    assert result.tobytes() == np.concatenate([matrix, matrix + 1]).tobytes()
    assert [len(keys) for keys, _ in iter_vectors(str(tmp_path))] == [5, 5]


def test_a_slice_keeps_its_own_rows():
    matrix = np.arange(12, dtype=np.float32).reshape(4, 3)
    table = vector_table(pa.array(list("abcd")), matrix)
    np.testing.assert_array_equal(table_matrix(table.slice(1, 2)), matrix[1:3])


def test_reading_vectors_that_are_not_there_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="holds no vectors"):
        read_vectors(str(tmp_path))
