"""What the terminal shows."""

import io
from pathlib import Path

from nvembed.training.progress import Progress


def test_rate_and_time_left() -> None:
    progress = Progress("stage_1", "/nowhere/metrics.jsonl", 100, io.StringIO())
    assert progress.describe(9, 1.5, now=50.0) == "step 10/100, loss 1.5000"
    assert progress.describe(19, 1.25, now=80.0) == "step 20/100, loss 1.2500, 3.00 s/step, 4:00 left"


def test_follows_the_file_and_shows_each_step_once(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", io.StringIO()
    with Progress("s", str(path), 3, out):
        path.write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert out.getvalue() == "s: step 2/3, loss 2.0000\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_line_is_rewritten(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", Terminal()
    path.write_text('{"step": 0, "loss": 3.0}\n')
    with Progress("s", str(path), 2, out):
        pass
    assert out.getvalue() == "\r\x1b[Ks: step 1/2, loss 3.0000\n"
