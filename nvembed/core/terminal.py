"""The terminal of a command: lines that stay, one status line that changes, nothing of what libraries write.

`Console()` holds a copy of standard error. While `redirected` is on, standard output and error of this process and its
children go to a file, so stray lines of libraries (C++ ones too) end there; the console still reaches the user.
The status line is a live display of rich, imported when the first one is shown; logs and pipes get plain lines.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from nvembed.core.secrets import mask

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

FRESH_SECONDS = 12.0  # how long a detail is shown beside the heartbeat
BAR = 24  # cells of a progress bar where the window has room


class Console:
    """Lines on a terminal or in a file, and below them a status line that the next one replaces (terminals only).

    Args:
        stream: a copy of standard error by default.
        quiet: only alerts are written.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or _copy(sys.stderr)
        self._lock = threading.RLock()  # an interrupt's alert may come in the middle of a line
        self._live: Live | None = None
        self._detail, self._detailed = "", 0.0
        self.quiet = quiet
        self.is_terminal = self._stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
        self.spoke = time.monotonic()  # time of the last output

    @property
    def width(self) -> int:
        """Columns of the window."""
        with suppress(OSError, ValueError, AttributeError):
            return os.get_terminal_size(self._stream.fileno()).columns
        return shutil.get_terminal_size().columns

    @property
    def detail(self) -> str:
        """The last text of `transient`; empty when it is older than `FRESH_SECONDS`."""
        return self._detail if time.monotonic() - self._detailed < FRESH_SECONDS else ""

    def line(self, text: str) -> None:
        """Write a line that stays; quiet consoles leave it out."""
        if not self.quiet:
            self.alert(text)

    def alert(self, text: str) -> None:
        """Write a line that a quiet console shows too: warnings, errors, how it ended."""
        with self._lock, self._guarded():
            if self._live is not None:
                self._live.console.print(mask(text), soft_wrap=True)
            else:
                self._stream.write(mask(text) + "\n")
                self._stream.flush()

    def status(self, text: str) -> None:
        """Replace the status line, cut to the window; where there is no terminal, write a line like any other."""
        if self.quiet or not self.is_terminal:
            self.line(text)
            return
        from rich.text import Text

        self._show(Text(mask(text), no_wrap=True, overflow="ellipsis"))

    def progress(self, name: str, done: int, total: int, fields: Sequence[str]) -> None:
        """Replace the status line by name, bar, `done/total` and the fields that have room. Terminals only."""
        if self.quiet or not self.is_terminal:
            return
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table

        columns = [Column(no_wrap=True, ratio=ratio) for ratio in (None, None, None, 1)]
        row = Table.grid(*columns, padding=(0, 1), expand=True)
        bar = ProgressBar(total, done, width=min(BAR, self.width // 6))
        row.add_row(mask(name), bar, f"{done}/{total}", mask("  ".join(fields)))
        self._show(row)

    def transient(self, text: str) -> None:
        """Show how far something is: a line where lines stay, on a terminal a part of the status line."""
        self._detail, self._detailed = text, time.monotonic()
        self.status(f"  {text}")

    def clear(self) -> None:
        """Remove the status line, and forget its detail."""
        self._detail = ""
        with self._lock, self._guarded():
            if self._live is not None:
                self._live.stop()
                self._live = None
                atexit.unregister(self.clear)

    def _show(self, status: RenderableType) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        with self._lock, self._guarded():
            if self._live is None:
                console = RichConsole(
                    file=self._stream, force_terminal=True, markup=False, emoji=False, highlight=False
                )
                self._live = Live(
                    console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
                )
                self._live.start()
                console.show_cursor(True)  # a killed process could not show it again
                atexit.register(self.clear)
            self._live.console.width = self.width  # of this stream; rich would ask standard input, output and error
            self._live.update(status, refresh=True)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """A terminal or a pipe whose reader is gone does not stop the run: its log file has the lines."""
        try:
            yield
        except (OSError, ValueError):
            self._live, self.is_terminal = None, False
        self.spoke = time.monotonic()


_current: list[Console] = []


def current() -> Console:
    """The console of the running command; one on standard error where no command runs."""
    return _current[-1] if _current else Console(sys.stderr)


@contextmanager
def used(console: Console) -> Iterator[Console]:
    """Make a console the current one."""
    _current.append(console)
    try:
        yield console
    finally:
        _current.remove(console)


@contextmanager
def redirected(path: str) -> Iterator[None]:
    """Send standard output and error (the descriptors, so children's and C++ lines too) to a file, appended.

    Python's own `print` still reaches the user. A crash of the interpreter is reported on the terminal.
    """
    try:
        out, err = sys.stdout.fileno(), sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # replaced by something that is no file, as in tests
        yield
        return
    before, copies = sys.stdout, [os.dup(out), os.dup(err)]
    with open(path, "ab", buffering=0) as file, os.fdopen(os.dup(err), "w") as crash:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout = _copy(sys.stdout)
        for descriptor in (out, err):
            os.dup2(file.fileno(), descriptor)
        faulthandler.enable(crash)
        try:
            yield
        finally:
            faulthandler.disable()
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout = before
            for descriptor, old in zip((out, err), copies, strict=True):
                os.dup2(old, descriptor)
                os.close(old)


def _copy(stream: Any) -> TextIO:
    """A stream of its own to where `stream` goes now; `stream` itself where it is no file."""
    try:
        return os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors="replace", buffering=1)
    except (OSError, ValueError, AttributeError):
        original: TextIO = stream
        return original


def clock(seconds: float) -> str:
    """`5:14`, `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def adopt_loggers(package: str) -> None:
    """Remove the handlers of a package's loggers, so that their records go to the root's."""
    for name in list(logging.root.manager.loggerDict):
        if name == package or name.startswith(f"{package}."):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
