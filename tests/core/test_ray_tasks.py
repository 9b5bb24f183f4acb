"""Numbered tasks under Ray: errors come back as they were raised, or are told as such."""

import errno
import functools
from pathlib import Path

import pytest

from nvembed.core.ray_tasks import run_tasks
from nvembed.pipeline.exit_codes import report_error
from nvembed.types import UserError


def write(folder: str, number: int) -> None:
    Path(folder, str(number)).write_text("done")


def refuse(folder: str, number: int) -> None:
    if number == 1:
        raise UserError(f"task {number} has bad input")


def fill(folder: str, number: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", f"{folder}/file")


@pytest.mark.ray
def test_errors_of_tasks(ray_session: None, tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_tasks(functools.partial(write, folder), 3, folder, "files")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"^task 1 has bad input$"):
        run_tasks(functools.partial(refuse, folder), 3, folder, "files")
    said: list[str] = []
    with pytest.raises(Exception) as raised:
        run_tasks(functools.partial(fill, folder), 2, folder, "files")
    assert report_error(raised.value, said.append, folder) == 4
    assert said[0] == f"error: OSError: [Errno 28] No space left on device: '{folder}/file'"
