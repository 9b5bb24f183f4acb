"""Parquet files: whole or absent, equal bytes for equal tables, errors that name the file."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvembed.core import storage
from nvembed.core.parquet import (
    Encoding,
    column_size,
    count_rows,
    group_rows,
    iter_parquet,
    parse_table,
    read_rows,
    read_schema,
    read_slice,
    read_table,
    read_where,
    table_bytes,
    write_table,
    write_tables,
)
from nvembed.core.steps import CorruptArtifactError

TABLE = pa.table({"row": list(range(10)), "other": list("abcdefghij")})


@pytest.fixture(params=["file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "file" else f"memory://{tmp_path.name}"


def test_a_table_written_by_row_groups_has_the_bytes_of_the_whole(folder: str) -> None:
    write_table(TABLE, f"{folder}/deep/whole.parquet", row_group_rows=4)
    groups = [TABLE.slice(start, 4) for start in (0, 4, 8)]
    assert write_tables(lambda: groups, TABLE.schema, f"{folder}/deep/groups.parquet") == 10
    contents = {storage.read_bytes(f"{folder}/deep/{name}.parquet") for name in ("whole", "groups")}
    assert contents == {table_bytes(TABLE, row_group_rows=4)}
    assert read_table(f"{folder}/deep/groups.parquet").equals(TABLE)
    assert group_rows(f"{folder}/deep/groups.parquet") == [4, 4, 2]
    assert count_rows(f"{folder}/deep/groups.parquet") == 10


def test_a_changed_page_is_noticed_where_pages_are_checked(folder: str) -> None:
    uri = f"{folder}/checked.parquet"
    data = table_bytes(TABLE, encoding=Encoding("none", dictionary=False, page_checksums=True))
    storage.write_bytes(uri, data)
    assert read_where(uri, None, ["other"], check_pages=True).equals(parse_table(data, ["other"]))
    storage.write_bytes(uri, data.replace(b"\x01\0\0\0b", b"\x01\0\0\0x"))
    with pytest.raises(OSError, match="CRC"):
        read_where(uri, None, ["other"], check_pages=True)
    assert read_where(uri, None, ["other"]).column("other").to_pylist() == list("axcdefghij")


def test_a_table_without_rows_is_one_empty_row_group(tmp_path: Path) -> None:
    uri = str(tmp_path / "empty.parquet")
    write_tables(lambda: [TABLE.slice(0, 0)], TABLE.schema, uri)
    assert storage.read_bytes(uri) == table_bytes(TABLE.slice(0, 0))
    assert read_table(uri).num_rows == 0


def test_an_encoding_is_stored_as_stated() -> None:
    plain = Encoding("zstd", dictionary=False, statistics=False, columns={"row": "DELTA_BINARY_PACKED"})
    column = pq.ParquetFile(pa.BufferReader(table_bytes(TABLE, encoding=plain))).metadata.row_group(0).column(0)
    assert (column.compression, column.statistics) == ("ZSTD", None) and "DELTA_BINARY_PACKED" in column.encodings


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(folder: str) -> None:
    uri = f"{folder}/rows.parquet"
    write_table(TABLE, uri)

    def failing() -> Iterator[pa.Table]:
        yield TABLE
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write_tables(failing, TABLE.schema, uri)
    assert read_table(uri).equals(TABLE) and storage.list_directory(folder) == ["rows.parquet"]


def test_what_is_no_parquet_file_is_named(tmp_path: Path) -> None:
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(table_bytes(TABLE)[:-9])
    for uri in (str(torn), str(tmp_path / "absent.parquet")):
        for read in (read_table, read_schema, count_rows, lambda uri: list(iter_parquet(uri))):
            with pytest.raises(CorruptArtifactError, match=rf"{uri} cannot be read .* Build its artifact again"):
                read(uri)


def test_a_column_that_is_absent_is_named(tmp_path: Path) -> None:
    uri = str(tmp_path / "rows.parquet")
    write_table(TABLE, uri)
    with pytest.raises(CorruptArtifactError, match=r"rows\.parquet has no column text, title"):
        read_table(uri, ["row", "text", "title"])
    with pytest.raises(CorruptArtifactError, match="has no column text"):
        list(iter_parquet(uri, ["text"]))


def test_the_size_of_a_column_is_in_the_footer(tmp_path: Path) -> None:
    uri = str(tmp_path / "rows.parquet")
    write_table(TABLE, uri, row_group_rows=3, encoding=Encoding(dictionary=False))
    rows, size = column_size(uri, "row")
    assert rows == 10 and size > 80


@pytest.mark.parametrize(("start", "count"), [(0, 3), (2, 5), (4, 4), (7, 30), (0, 0), (10, 2)])
def test_some_rows_are_read_from_the_row_groups_that_hold_them(tmp_path, start, count):
    table = pa.table({"row": list(range(10)), "other": list("abcdefghij")})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=4)
    uri = str(tmp_path / "rows.parquet")
    assert read_slice(uri, start, count).to_pylist() == table.slice(start, count).to_pylist()
    assert read_slice(uri, start, count, ["row"]).column_names == ["row"]


KEYS = st.lists(st.text("abcé", min_size=1, max_size=2), unique=True, max_size=20)


@given(KEYS, KEYS, st.integers(1, 6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_rows_by_key_are_those_of_a_plain_selection(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], wanted: list[str], group: int
) -> None:
    """The test that counts which row groups are read is in `tests/stream/test_join.py`."""
    uri = str(tmp_path_factory.mktemp("rows") / "rows.parquet")
    table = pa.table({"key": pa.array(keys, pa.string()), "number": pa.array(range(len(keys)), pa.int64())})
    write_table(table, uri, row_group_rows=group)
    plain = [row for row in table.to_pylist() if row["key"] in wanted]
    assert read_rows(uri, "key", iter(wanted)).to_pylist() == plain
    assert read_rows(uri, "key", pa.array(wanted, pa.large_string())).schema == table.schema
    numbers = read_rows(uri, "key", pa.array(wanted, pa.large_string()), ["number"])
    assert numbers.to_pylist() == [{"number": row["number"]} for row in plain]
    assert read_where(uri, pc.field("number") >= 3, ["key"]).column("key").to_pylist() == keys[3:]
