"""Rows for many shards: the same as each shard reading the table for itself, each row group read once."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvembed.core.parquet import read_rows
from nvembed.stream import join
from nvembed.stream.join import Gather

LISTS = pa.list_(pa.struct([("id", pa.string()), ("score", pa.float64())]))
SCHEMA = pa.schema([("lists", LISTS), ("key", pa.string()), ("text", pa.string())])


def write(folder: Path, keys: list[list[str]], row_group_rows: int) -> tuple[str, ...]:
    uris = []
    for number, names in enumerate(keys):
        columns = {
            "lists": [[{"id": f"{key}{n}", "score": n / 3} for n in range(len(key))] for key in names],
            "key": names,
            "text": [f"text of {key}" for key in names],
        }
        uris.append(str(folder / f"table-{number}.parquet"))
        pq.write_table(pa.table(columns, SCHEMA), uris[-1], row_group_size=row_group_rows)
    return tuple(uris)


KEYS = st.text("abcé😀", min_size=1, max_size=3)


@st.composite
def tables(draw: st.DrawFn) -> list[list[str]]:
    keys = draw(st.lists(KEYS, unique=True, max_size=25))
    if draw(st.booleans()):
        keys.sort()
    cut = draw(st.integers(0, len(keys)))
    return [keys[:cut], keys[cut:]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tables(), st.lists(st.lists(KEYS, max_size=12), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 9))
def test_every_shard_gets_its_rows(
    tmp_path_factory: pytest.TempPathFactory, keys: list[list[str]], asks: list[list[str]], group: int, part: int
) -> None:
    folder = tmp_path_factory.mktemp("gather")
    uris = write(folder, keys, group)
    job = Gather(str(folder / "work"), uris, "key", ("text", "lists"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "PART_ROWS", part)
        patch.setattr(join, "MAX_PARTS", 5)
        job.run(asks)
    for shard, wanted in enumerate(asks):
        plain = [row for uri in uris for row in read_rows(uri, "key", wanted, ["key", "text", "lists"]).to_pylist()]
        assert job.rows(shard).to_pylist() == plain


def test_a_table_is_read_once_and_only_where_it_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"{number:03}" for number in range(100)]
    uris = write(tmp_path, [keys], 10)
    read: list[tuple[int, int]] = []
    plain = pq.ParquetFile.read_row_group

    def noted(file: pq.ParquetFile, group: int, columns: list[str] | None = None) -> pa.Table:
        if "text" in (columns or []):
            read.append((group, len(columns or [])))
        return plain(file, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    job = Gather(str(tmp_path / "work"), uris, "key", ("text",))
    job.run([["005", "031"], ["039", "005"], ["nowhere"], ["031"]])
    assert read == [(0, 2), (3, 2)]
    assert [job.rows(shard).column("key").to_pylist() for shard in range(4)] == [
        ["005", "031"], ["005", "039"], [], ["031"],
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this process, whatever other tests left connected."""
    import sys

    monkeypatch.delitem(sys.modules, "ray", raising=False)
    yield
