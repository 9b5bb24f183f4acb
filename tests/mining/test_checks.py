"""Rows picked from shards in one pass: those a plain filter picks, for texts and for vectors however stored."""

import errno
import tempfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.core.vectors import iter_vectors, table_matrix, vector_table, write_shard
from nvembed.mining.checks import PickedRows

KEYS = [f"k{number:02}" for number in range(40)]
chosen = st.lists(st.sampled_from([*KEYS, "nowhere", ""]), max_size=50)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(4):
        keys = KEYS[number::4]
        table = pa.table({"key": keys, "text": [f"text {key} \u5b57" for key in keys], "hash": range(len(keys))})
        write_shard(table, str(folder / f"part-{number:05}.parquet"))
    return str(folder)


@given(wanted=st.sets(st.sampled_from([*KEYS, "nowhere"])), taken=chosen)
def test_wanted_rows_are_picked(texts, wanted, taken):
    picked = PickedRows(texts, pa.array(sorted(wanted), pa.string()), ["text"])
    there = wanted - {"nowhere"}
    assert len(picked.take(pa.array(sorted(wanted), pa.string()))) == len(there)
    rows = picked.take(pa.array(taken, pa.string())).to_pylist()
    assert rows == [{"key": key, "text": f"text {key} \u5b57"} for key in taken if key in there]
    assert picked.take_column("text", taken) == {row["key"]: row["text"] for row in rows}


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "int8"])
def test_vectors_come_back_as_they_are_stored(tmp_path, kind):
    matrix = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    for number in range(3):
        rows = slice(number * 14, (number + 1) * 14)
        write_shard(vector_table(pa.array(KEYS[rows]), matrix[rows], kind), str(tmp_path / f"part-{number:05}.parquet"))
    stored = {key: row for keys, block in iter_vectors(str(tmp_path)) for key, row in zip(keys, block, strict=True)}
    taken = ["k39", "k00", "k20", "k00"]
    rows = PickedRows(str(tmp_path), pa.array(["k00", "k20", "k39"]), ["vector"]).take(pa.array(taken))
    assert rows.column("key").to_pylist() == taken
    np.testing.assert_array_equal(table_matrix(rows), [stored[key] for key in taken])


def test_a_full_temporary_folder_is_named(tmp_path, small_disk, monkeypatch):
    keys = [str(number) for number in range(64)]
    write_shard(pa.table({"key": keys, "text": [key * 40_000 for key in keys]}), str(tmp_path / "part-00000.parquet"))
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk.place))
    with pytest.raises(OSError, match="TMPDIR") as raised:
        PickedRows(str(tmp_path), pa.array(keys), ["text"])
    assert raised.value.errno == errno.ENOSPC and str(small_disk.place) in str(raised.value)
    assert not list(small_disk.place.iterdir())
    small_disk.resize("64m")
    assert len(PickedRows(str(tmp_path), pa.array(keys), ["text"]).take(pa.array(keys))) == 64
