"""The terminal of a command: lines that stay, one status line that changes, nothing of what libraries write.

`Console()` holds a copy of standard error. While `redirected` is on, standard output and error of this process and its
children go to a file, so stray lines of libraries (C++ ones too) end there; the console still reaches the user.
Layer 0, light: the training's progress line comes from layer 3.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from nvembed.core.secrets import mask

BAR = 24  # cells of a progress bar where the window has room
FRESH_SECONDS = 12.0  # how long a detail stands beside the heartbeat


class Console:
    """Lines on a terminal or in a file; `status` is a line that the next one replaces (terminals only).

    Args:
        stream: a copy of standard error by default.
        quiet: only alerts are written.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or _copy(sys.stderr)
        self._lock = threading.Lock()
        self._status = False
        self._detail, self._detailed = "", 0.0
        self.quiet = quiet
        self.is_terminal = self._stream.isatty()
        self.spoke = time.monotonic()

    @property
    def width(self) -> int:
        """Columns of the window."""
        with suppress(OSError, ValueError, AttributeError):
            return os.get_terminal_size(self._stream.fileno()).columns
        return shutil.get_terminal_size().columns

    @property
    def detail(self) -> str:
        """What was last told by `transient`, empty when that is long ago."""
        return self._detail if time.monotonic() - self._detailed < FRESH_SECONDS else ""

    def line(self, text: str) -> None:
        """Write a line that stays; quiet consoles leave it out."""
        if not self.quiet:
            self._write(text + "\n", keep=True)

    def alert(self, text: str) -> None:
        """Write a line that a quiet console shows too: warnings, errors, how it ended."""
        self._write(text + "\n", keep=True)

    def status(self, text: str) -> None:
        """Write a line that the next one replaces, cut to the window; on no terminal it is a line like any other."""
        if self.quiet:
            return
        if self.is_terminal:
            self._write(text[: max(self.width - 1, 1)], keep=False)
        else:
            self.line(text)

    def transient(self, text: str) -> None:
        """Tell how far something is: a line where lines stay, on a terminal a part of the status line."""
        self._detail, self._detailed = text, time.monotonic()
        if self.is_terminal:
            self.status(f"  {text}")
        else:
            self.line(f"  {text}")

    def _write(self, text: str, *, keep: bool) -> None:
        with self._lock:
            text = mask(text)
            clear = "\r\033[K" if self._status or not keep else ""
            # where the reader of a pipe is gone, the run goes on: its log file has the lines
            with suppress(OSError, ValueError):
                self._stream.write(clear + text)
                self._stream.flush()
            self._status = not keep
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

    Python's own `print` still reaches the user. A crash of the interpreter is told on the terminal.
    """
    try:
        out, err = sys.stdout.fileno(), sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # replaced by something that is no file, as in tests
        yield
        return
    before, kept = sys.stdout, [os.dup(out), os.dup(err)]
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
            for descriptor, old in zip((out, err), kept, strict=True):
                os.dup2(old, descriptor)
                os.close(old)


def _copy(stream: Any) -> TextIO:
    """A stream of its own to where `stream` goes now; `stream` itself where it is no file."""
    try:
        return os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors="replace", buffering=1)
    except (OSError, ValueError, AttributeError):
        kept: TextIO = stream
        return kept


def bar(done: int, total: int, cells: int = BAR) -> str:
    """`━━━━────`: how much of the whole is done."""
    full = round(cells * done / total) if total else 0
    return "━" * full + "─" * (cells - full)


def fitted(head: str, done: int, total: int, fields: list[str], width: int) -> str:
    """One line within a window: head, bar, then as many fields as have room, the first ones first."""
    for cells in (BAR, BAR // 3, 0):
        line = " ".join(part for part in (head, bar(done, total, cells)) if part)
        kept = [line]
        for field in fields:
            if len("  ".join([*kept, field])) >= width:
                break
            kept.append(field)
        if len(kept) > min(3, len(fields)) or cells == 0:
            return "  ".join(kept)[: max(width - 1, 1)]
    raise AssertionError("the last round returns")


def clock(seconds: float) -> str:
    """`5:14`, `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def adopt_loggers(package: str) -> None:
    """Let a package's loggers write where everybody does, instead of to handlers of their own."""
    for name in list(logging.root.manager.loggerDict):
        if name == package or name.startswith(f"{package}."):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
