"""Paths and URIs: there and back for any name, and what fsspec, MLflow and SQLAlchemy make of them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.core import storage
from nvembed.core.uris import file_path, file_uri, is_path, sqlite_path, sqlite_uri

NAMES = ["a b", "ü", "50%", "a%20b", "a#b", "a?b=c", "a::b", "a*b", "a[b]", "a:b", "a\\b", "a&b;c+d", "'quoted'"]


@given(st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1))
def test_there_and_back(name: str) -> None:
    path = f"/folder/{name}/x"
    if Path(path).as_posix() == path:  # "." is not a name
        assert file_path(file_uri(path)) == path
        assert str(sqlite_path(sqlite_uri(path))) == path
        assert is_path(path) and not is_path(file_uri(path))


@pytest.mark.parametrize("name", NAMES)
def test_files_of_any_name_are_written_and_read_by_path_and_by_uri(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    for place in (str(folder), file_uri(folder)):
        storage.write_bytes(storage.join(place, "x") if place == str(folder) else f"{place}/x", b"1")
        assert storage.is_local(place) and storage.local_path(place) == folder
        assert storage.list_directory(place) == ["x"] and storage.read_bytes(f"{place}/x") == b"1"
        storage.remove(place)
        assert not folder.exists()


def test_forms_of_a_file_uri() -> None:
    assert [file_path(uri) for uri in ("file:///a%20b", "file:/a%20b", "file://localhost/a b")] == ["/a b"] * 3
    assert storage.local_path("/a%20b") == Path("/a%20b"), "a path is not decoded"


@pytest.mark.parametrize("name", ["a%20b?c#d ü"])
def test_sqlalchemy_opens_the_file(tmp_path: Path, name: str) -> None:
    from sqlalchemy import create_engine, text

    (tmp_path / name).mkdir()
    with create_engine(sqlite_uri(tmp_path / name / "x.db")).begin() as connection:
        connection.execute(text("create table t (x)"))
    assert (tmp_path / name / "x.db").stat().st_size > 0
