"""A disk that fills up while a step writes: a real one, a small tmpfs. Skipped where mounting is not allowed."""

import errno
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvembed import storage
from nvembed.data.config import FilesSource, PrepareConfig
from nvembed.data.export import write_rows
from nvembed.data.prepare import PREPARE
from nvembed.types import Artifact


def mount(*arguments: str) -> bool:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)):
        pytest.skip("mounting a tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], capture_output=True, timeout=20, check=False)


def prepare(rows: Path, out: Path) -> Artifact:
    source = FilesSource(name="mine", instruction="web_search", uris=(str(rows),))
    return PREPARE.run(PrepareConfig(sources=(source,)), {}, str(out))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = (
        json.dumps({"anchor": f"{i} {i**7} asked", "positive": " ".join(str((i * 100 + k) ** 9) for k in range(60))})
        for i in range(2000)
    )
    path.write_text("\n".join(lines))
    return path


def test_a_full_disk_stops_prepare_and_room_lets_it_finish(rows: Path, small_disk: Path, tmp_path: Path) -> None:
    out = small_disk / "out"
    with pytest.raises(OSError) as raised:
        prepare(rows, out)
    assert raised.value.errno == errno.ENOSPC and f"{out}/" in str(raised.value)
    assert not (out / storage.MANIFEST).exists()
    with pytest.raises(storage.CorruptArtifactError, match="not a published artifact"):
        storage.load_artifact(str(out))
    assert mount("-o", "remount,size=64m", str(small_disk))
    mended, clean = prepare(rows, out), prepare(rows, tmp_path / "clean")
    assert mended.manifest["files"] == clean.manifest["files"]
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "mine"]


def test_a_full_temporary_folder_is_named(
    rows: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with pytest.raises(OSError, match="set TMPDIR") as raised:
        prepare(rows, tmp_path / "out")
    assert raised.value.errno == errno.ENOSPC and str(small_disk) in str(raised.value)
    assert not (tmp_path / "out" / storage.MANIFEST).exists() and not list(small_disk.iterdir())
    monkeypatch.undo()
    prepare(rows, tmp_path / "out")


def test_a_file_that_does_not_fit_is_not_there(small_disk: Path) -> None:
    kept = small_disk / "kept.jsonl"
    write_rows([{"text": "kept"}], str(kept))
    with pytest.raises(OSError) as raised:
        write_rows(({"text": "x" * 1000} for _ in range(2000)), str(small_disk / "rows.jsonl"))
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError):
        storage.write_bytes(str(kept), b"x" * (2 << 20))
    assert [path.name for path in small_disk.iterdir()] == ["kept.jsonl"]
    assert json.loads(kept.read_text()) == {"text": "kept"}
