"""The terminal: what a window has room for, what a quiet run shows, where libraries' lines go."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.core.terminal import Console, clock

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ["4:01 left", "loss 2.3948", "4.15 s/step", "860 tokens/s", "saved 0:40 ago"]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    """A terminal that collects what is written to it."""

    def isatty(self) -> bool:
        return True


class Window(Console):
    """A console on a terminal of so many columns."""

    def __init__(self, columns: int) -> None:
        self.terminal, self.columns = Terminal(), columns
        super().__init__(self.terminal)

    @property
    def width(self) -> int:
        return self.columns

    def rows(self) -> list[str]:
        """What was written, without colours and movements of the cursor."""
        return [row.rstrip() for row in re.split(r"[\r\n]+", CONTROL.sub("", self.terminal.getvalue())) if row.strip()]


@given(st.integers(2, 200), st.integers(0, 70), st.text("abc_ [/]", min_size=1, max_size=40))
def test_the_status_fits_its_window(columns: int, done: int, name: str) -> None:
    window = Window(columns)
    window.status(name * 10)
    window.progress(name, done, 70, FIELDS)
    assert all(len(row) <= columns for row in window.rows())


def test_fields_leave_a_narrow_window_from_the_right() -> None:
    shown = {}
    for columns in (150, 80, 30):
        window = Window(columns)
        window.progress("train_stage_1", 70, 70, FIELDS)
        (shown[columns],) = window.rows()
    assert shown[150] == "train_stage_1 " + "━" * 24 + " 70/70 " + "  ".join(FIELDS)
    assert shown[80] == "train_stage_1 " + "━" * 13 + " 70/70 4:01 left  loss 2.3948  4.15 s/step  860 toke…"
    assert shown[30] == "train_stage_1 ━━━━━ 70/70 4:0…"


def test_a_status_is_replaced_and_lines_stay_above_it() -> None:
    window = Window(60)
    window.line("before")
    window.status("half")
    assert window.terminal.getvalue().startswith("before\n"), "written as it is where nothing is live"
    window.line("[bold]a line[/bold] :smile: " + "that is not cut " * 5)
    window.status("whole")
    window.clear()
    window.line("after")
    text = window.terminal.getvalue()
    assert [row for row in window.rows() if row != "half"] == [
        "before",
        ("[bold]a line[/bold] :smile: " + "that is not cut " * 5).rstrip(),
        "whole",
        "whole",
        "after",
    ]
    assert text.endswith("\x1b[2Kafter\n") and text.count("\x1b[2K") == 4, "each frame and line erases the status"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is visible"


@pytest.mark.parametrize("variable", [{"TERM": "dumb"}, {"NO_COLOR": "1", "TERM": "xterm-256color"}])
def test_plain_lines_on_a_dumb_terminal_and_no_colour_where_it_is_not_wanted(
    variable: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    window = Window(80)
    window.progress("train", 1, 2, FIELDS)
    window.status("half")
    if variable["TERM"] == "dumb":
        assert window.terminal.getvalue() == "half\n" and not window.is_terminal
    else:
        assert "\x1b[38" not in window.terminal.getvalue() and "train ━━━━" in window.terminal.getvalue()


def test_elsewhere_every_status_is_a_line_and_rich_is_not_imported() -> None:
    script = """
import sys
from nvembed.core.terminal import Console
console = Console()
console.status("half")
console.progress("train", 1, 2, [])
console.clear()
console.transient("far")
console.line("[bold]whole")
assert "rich" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "half\n  far\n[bold]whole\n"


def test_a_terminal_that_is_gone_does_not_stop_the_run() -> None:
    window = Window(60)
    window.status("half")
    window.terminal.close()
    for write in (window.line, window.status, window.alert):
        write("more")
    assert not window.is_terminal


def test_secrets_are_masked_in_every_line() -> None:
    window = Window(120)
    secret = "https://user:canary-canary@host/x"
    window.line(secret)
    window.progress(secret, 1, 2, [secret])
    window.transient(secret)
    window.alert(secret)
    assert "canary" not in window.terminal.getvalue() and "host/x" in window.terminal.getvalue()


def test_clocks() -> None:
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
    assert "half" * 30 not in said, "a status line never wraps (80 columns where the window does not report them)"


def test_a_crash_of_the_interpreter_is_printed_on_the_terminal(tmp_path: Path) -> None:
    code, said = run_stray(tmp_path / "log", "crash")
    assert code != 0 and "Fatal Python error: Aborted" in said
