"""A disk that fills up while a step writes: a real one, a small tmpfs. Skipped where mounting is not allowed."""

import errno
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nvembed.core import storage
from nvembed.core.steps import MANIFEST, CorruptArtifactError, load_artifact
from nvembed.data.config import FilesSource, PrepareConfig
from nvembed.data.prepare import PREPARE
from nvembed.data.writers import write_rows
from nvembed.types import Artifact


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


def test_a_full_disk_stops_prepare_and_room_lets_it_finish(rows: Path, small_disk: Any, tmp_path: Path) -> None:
    out = small_disk.place / "out"
    with pytest.raises(OSError) as raised:
        prepare(rows, out)
    assert raised.value.errno == errno.ENOSPC and f"{out}/" in str(raised.value)
    assert not (out / MANIFEST).exists()
    with pytest.raises(CorruptArtifactError, match="not a published artifact"):
        load_artifact(str(out))
    small_disk.resize("64m")
    mended, clean = prepare(rows, out), prepare(rows, tmp_path / "clean")
    assert mended.manifest["files"] == clean.manifest["files"]
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "mine"]


def test_a_full_temporary_folder_is_named(
    rows: Path, small_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk.place))
    with pytest.raises(OSError, match="set TMPDIR") as raised:
        prepare(rows, tmp_path / "out")
    assert raised.value.errno == errno.ENOSPC and str(small_disk.place) in str(raised.value)
    assert not (tmp_path / "out" / MANIFEST).exists() and not list(small_disk.place.iterdir())
    monkeypatch.undo()
    prepare(rows, tmp_path / "out")


def test_a_file_that_does_not_fit_is_not_there(small_disk: Any) -> None:
    remaining = small_disk.place / "kept.jsonl"
    write_rows([{"text": "kept"}], str(remaining))
    with pytest.raises(OSError) as raised:
        write_rows(({"text": "x" * 1000} for _ in range(2000)), str(small_disk.place / "rows.jsonl"))
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError):
        storage.write_bytes(str(remaining), b"x" * (2 << 20))
    assert [path.name for path in small_disk.place.iterdir()] == ["kept.jsonl"]
    assert json.loads(remaining.read_text()) == {"text": "kept"}
