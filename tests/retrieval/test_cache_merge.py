"""Merging the cache's small parts: nothing is lost, a reader of the old parts still sees them, stops are mended."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from nvembed.core import storage
from nvembed.core.parquet import read_table
from nvembed.core.vectors import shard_content
from nvembed.retrieval import cache_merge
from nvembed.retrieval.cache import VectorCache, row_key
from nvembed.retrieval.cache_merge import list_parts, merge_small, sections

DIM = 6


def key(number):
    return row_key(f"text {number}", "", 8)


def add(folder, first, count, kind="fp32"):
    rng = np.random.default_rng(first)
    matrix = rng.normal(size=(count, DIM)).astype(np.float32)
    cut = (np.arange(first, first + count) % 3 == 0).astype(np.int8)
    VectorCache(str(folder), "model", kind, []).add([key(first + number) for number in range(count)], matrix, cut)


def known(cache, count):
    found = cache.find([key(number) for number in range(count)])
    return {number: (vector.tolist(), cut) for number, (vector, cut) in found.items()}


def opened(folder, parts=None, kind="fp32"):
    return VectorCache(str(folder), "model", kind, parts)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(cache_merge, "MANY", 5)
    monkeypatch.setattr(cache_merge, "MERGED_BYTES", 16_000)  # a handful of parts
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_a_merged_cache_gives_the_same_rows(tmp_path, kind):
    uri = str(tmp_path / "model")
    for first in range(0, 200, 10):
        add(tmp_path, first, 10, kind)
    before, noted = known(opened(tmp_path, kind=kind), 250), list_parts(uri)
    late = opened(tmp_path, kind=kind)  # opened before, looks after
    assert len(before) == 200 and merge_small(uri) == 20
    left = list_parts(uri)
    assert 1 < len(left) < 10 and not set(left) & set(noted)
    assert known(opened(tmp_path, kind=kind), 250) == before
    assert known(late, 250) == before and late.damaged == []
    for parts in (noted, noted[:7]):  # a run that goes on sees the parts of its first start, and no others
        again = opened(tmp_path, parts, kind)
        assert len(again) == 10 * len(parts) and again.damaged == []
        assert known(again, 250).items() <= before.items() and len(known(again, 250)) == len(again)
    add(tmp_path, 200, 50, kind)
    for first in range(300, 340, 10):
        add(tmp_path, first, 10, kind)
    assert merge_small(uri) > 0  # merged parts among them, once more
    assert known(opened(tmp_path, noted, kind), 250) == before
    assert len(opened(tmp_path, kind=kind)) == 290 and len(sections(uri)) > len(noted)
    assert merge_small(uri) == 0


def test_few_or_large_parts_stay(tmp_path):
    uri = str(tmp_path / "model")
    for first in range(0, 40, 10):
        add(tmp_path, first, 10)
    parts = list_parts(uri)
    assert merge_small(uri) == 0 and list_parts(uri) == parts
    assert merge_small(str(tmp_path / "nowhere")) == 0


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_stop_at_any_write_or_removal_loses_nothing(tmp_path, monkeypatch, stop):
    uri = str(tmp_path / "model")
    for first in range(0, 80, 10):
        add(tmp_path, first, 10)
    before, noted = known(opened(tmp_path), 80), list_parts(uri)
    left = iter(range(stop - 1))

    def limited(function):
        def call(*arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    with monkeypatch.context() as patched:
        for name in ("write_bytes", "remove"):
            patched.setattr(storage, name, limited(getattr(storage, name)))
        try:
            merge_small(uri)
        except KeyboardInterrupt:
            pass
        else:
            assert stop > 8
    for cache in (opened(tmp_path), opened(tmp_path, noted)):
        assert known(cache, 80) == before and cache.damaged == []
    for first in range(100, 150, 10):  # what a stop left over goes with the next small parts
        add(tmp_path, first, 10)
    while merge_small(uri):
        pass
    for cache in (opened(tmp_path), opened(tmp_path, noted)):
        assert known(cache, 80) == before and cache.damaged == []
    assert sum(pq.read_metadata(f"{uri}/{name}").num_rows for name in list_parts(uri)) == 130


def test_damaged_and_older_parts_are_kept_apart(tmp_path, caplog):
    uri = str(tmp_path / "model")
    for first in range(0, 80, 10):
        add(tmp_path, first, 10)
    names = list_parts(uri)
    whole = (tmp_path / "model" / names[0]).read_bytes()
    (tmp_path / "model" / names[0]).write_bytes(whole[:-9])
    for name in names[1:4]:  # as an older nvembed wrote them
        data = shard_content(read_table(f"{uri}/{name}", ["key", "vector"]), checksums=True)
        os.unlink(f"{uri}/{name}")
        (tmp_path / "model" / cache_merge.part_name(data)).write_bytes(data)
    before = known(opened(tmp_path), 80)
    assert len(before) == 70 and sorted({cut for _, cut in before.values()}) == [-1, 0, 1]
    assert merge_small(uri) == 7
    cache = opened(tmp_path)
    assert known(cache, 80) == before and cache.damaged == [names[0]]
    assert names[0] in caplog.text


def test_on_an_object_store(store):
    for first in range(0, 60, 10):
        add("s3://bucket/cache", first, 10)
    noted = list_parts("s3://bucket/cache/model")
    before = known(opened("s3://bucket/cache"), 60)
    assert len(before) == 60 and merge_small("s3://bucket/cache/model") == 6
    assert len(list_parts("s3://bucket/cache/model")) < 4
    for parts in (None, noted):
        assert known(opened("s3://bucket/cache", parts), 60) == before
