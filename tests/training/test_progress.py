"""What the terminal shows of a training stage."""

import io
import json
import os
import re
import time
from pathlib import Path

import pytest

from nvembed.core.terminal import Console
from nvembed.training.progress import WINDOW, Progress, describe, read_rows


def row(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "loss": 3.0 - step / 100, "seconds": 2.0, "tokens": 500, **values}


def lines(*rows: dict[str, float]) -> str:
    return "".join(json.dumps(item) + "\n" for item in rows)


def test_rate_tokens_and_time_left() -> None:
    count, fields = describe([row(8, seconds=30.0), row(9), row(10)], 70, 12.0)
    assert count == "11/70"
    assert fields == ["1:58 left", "loss 2.9000", "2.00 s/step", "44 tokens/s", "saved 0:12 ago"]
    assert describe([{"step": 0, "loss": 1.5}], 3, None) == ("1/3", ["loss 1.5000"])


def test_the_rate_right_after_a_resume_is_that_of_the_steps(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", io.StringIO()
    path.write_text(lines(*(row(step) for step in range(30))))
    with Progress("stage_1", str(path), 100, Console(out)):
        time.sleep(0.3)  # a start takes its time, none of it is a step's
        with path.open("a") as file:
            file.write(lines(row(30)))
    assert out.getvalue() == "stage_1: step 31/100, 2:18 left, loss 2.7000, 2.00 s/step, 250 tokens/s\n"


def test_what_an_earlier_run_wrote_is_not_shown_as_progress(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", io.StringIO()
    path.write_text(lines(row(5)))
    progress = Progress("s", str(path), 9, Console(out))
    with progress:
        progress._show()
        assert out.getvalue() == ""


def test_follows_the_file_and_shows_each_step_once(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", io.StringIO()
    with Progress("s", str(path), 3, Console(out)):
        path.write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert out.getvalue() == "s: step 2/3, loss 2.0000\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_changes_and_the_last_line_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    path, out = tmp_path / "metrics.jsonl", Terminal()
    progress = Progress("s", str(path), 4, Console(out))
    with progress:
        path.write_text(lines(row(0)))
        progress._show()
        path.write_text(lines(row(0), row(1)))
    frames = [frame for frame in re.split(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", out.getvalue()) if frame.strip()]
    assert re.match(r"s ━━━━━ +1/4 0:06 left  loss 3\.0000", frames[0])
    assert frames[-1] == "s: step 2/4, 0:04 left, loss 2.9900, 2.00 s/step, 250 tokens/s"
    assert out.getvalue().endswith("\x1b[2K" + frames[-1] + "\n"), "the bar is removed before it"


def test_a_quiet_console_shows_no_step(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", io.StringIO()
    with Progress("s", str(path), 3, Console(out, quiet=True)):
        path.write_text(lines(row(0)))
    assert out.getvalue() == ""


def test_the_age_of_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", io.StringIO()
    for step, age in ((10, 100.0), (20, 65.0)):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        os.utime(folder / "manifest.json", (time.time() - age,) * 2)
    (tmp_path / "checkpoints" / "step-000030").mkdir()
    with Progress("s", str(path), 50, Console(out)):
        path.write_text(lines(row(20)))
    assert out.getvalue().endswith("saved 1:05 ago\n") or out.getvalue().endswith("saved 1:06 ago\n")


def test_only_the_last_rows_of_a_long_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(*(row(step, note=7.0) for step in range(5000))))
    rows = read_rows(path)
    assert len(rows) == WINDOW and rows[-1]["step"] == 4999
    assert read_rows(tmp_path / "no") == []
