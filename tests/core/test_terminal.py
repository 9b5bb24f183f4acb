"""The terminal: what a window has room for, what a quiet run shows, where libraries' lines go."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from nvembed.core.terminal import Console, bar, clock, fitted

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ["4:01 left", "loss 2.3948", "4.15 s/step", "860 tokens/s", "saved 0:40 ago"]


@given(st.integers(2, 200), st.integers(0, 70), st.text("abc_", min_size=1, max_size=40))
def test_a_line_fits_its_window(width: int, done: int, head: str) -> None:
    assert len(fitted(head, done, 70, FIELDS, width)) < width


def test_fields_leave_a_narrow_window_from_the_right() -> None:
    wide = fitted("train_stage_1 12/70", 12, 70, FIELDS, 140)
    assert wide == "train_stage_1 12/70 " + bar(12, 70) + "  " + "  ".join(FIELDS)
    assert (
        fitted("train_stage_1 12/70", 12, 70, FIELDS, 60) == "train_stage_1 12/70  4:01 left  loss 2.3948  4.15 s/step"
    )
    assert fitted("train_stage_1 12/70", 12, 70, FIELDS, 24) == "train_stage_1 12/70"


def test_bars_and_clocks() -> None:
    assert (bar(0, 4, 4), bar(1, 4, 4), bar(4, 4, 4)) == ("────", "━───", "━━━━")
    assert (clock(5), clock(314.9), clock(3723)) == ("0:05", "5:14", "1:02:03")


def test_a_quiet_console_shows_alerts_only() -> None:
    out = io.StringIO()
    console = Console(out, quiet=True)
    console.line("a")
    console.status("b")
    console.transient("c")
    console.alert("d")
    assert out.getvalue() == "d\n"


STRAY = """
import os, subprocess, sys
from nvembed.core.terminal import Console, redirected
console = Console()
with redirected(sys.argv[1]):
    os.write(2, b"a C++ line\\n")
    os.write(1, b"another\\n")
    subprocess.run([sys.executable, "-c", "import sys; print('a child'); print('its error', file=sys.stderr)"])
    sys.stderr.write("Loading extension module\\n")
    print("the user's own print")
    console.line("a line of ours")
    console.status("half" * 100)
    if len(sys.argv) > 2:
        os.abort()
os.write(2, b"afterwards\\n")
"""


def run_stray(log: Path, *more: str) -> tuple[int, str]:
    """Exit code and what reached the terminal, a real one of 40 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", STRAY, str(log), *more], stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    return process.wait(timeout=30), said.decode()


def test_stray_lines_go_to_the_log_and_ours_to_the_terminal(tmp_path: Path) -> None:
    code, said = run_stray(tmp_path / "log")
    assert code == 0 and "a line of ours" in said and "the user's own print" in said and "afterwards" in said
    log = (tmp_path / "log").read_text()
    for stray in ("a C++ line", "another", "a child", "its error", "Loading extension module"):
        assert stray in log and stray not in said
    assert "half" * 30 not in said, "a status line never wraps (80 columns where the window does not say)"


def test_a_crash_of_the_interpreter_is_told_on_the_terminal(tmp_path: Path) -> None:
    code, said = run_stray(tmp_path / "log", "crash")
    assert code != 0 and "Fatal Python error: Aborted" in said
