"""Console lines and log file of a run: a heartbeat, log records; libraries' own lines go to the file only.

A training step's own lines (step, loss, rate, time left) come from `training/progress.py`, encoding's from
`retrieval/encode.py`; the heartbeat is written only where they are silent. On a terminal it is one changing line.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvembed.core import storage
from nvembed.core.secrets import MaskingFormatter
from nvembed.core.steps import METRICS
from nvembed.core.terminal import Console, redirected, used

TICK_SECONDS = 1.0
QUIET_SECONDS = 5.0  # silence before a heartbeat; on a terminal it comes every tick
LOUD = "DeepSpeed"  # a logger that warns on standard output while its package is imported


class _ConsoleHandler(logging.Handler):
    """Writes our own messages as they are and libraries' errors with their name; their warnings go to the file only."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.partition(".")[0] in ("nvembed", "__main__")
        if not ours and record.levelno < logging.ERROR:
            return
        name = "" if ours else f"{record.name}: "
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        if getattr(record, "transient", False):
            self._console.transient(record.getMessage())
        else:
            write = self._console.alert if record.levelno >= logging.WARNING else self._console.line
            write(f"  {level}{name}{record.getMessage()}")


@contextmanager
def logged(console: Console, out: str) -> Iterator[str]:
    """Send log records to the console and to a file, and what libraries write on standard output and error to the file.

    Yields:
        Path of the file: below `<out>/logs/`, or in the temporary directory where the output is remote.
    """
    root, ours = logging.getLogger(), logging.getLogger("nvembed")
    before = root.handlers[:], root.level, ours.level
    folder = f"{out}/logs" if storage.is_local(out) else tempfile.mkdtemp(prefix="nvembed-logs-")
    path = f"{folder}/run-{time.strftime('%Y%m%d-%H%M%S')}.log"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    handlers: list[logging.Handler] = [_ConsoleHandler(console), file]
    root.handlers[:] = handlers
    root.setLevel(logging.WARNING)
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)
    hook, threading.excepthook = threading.excepthook, _log_dead_thread
    loud = logging.getLogger(LOUD)
    loud.addFilter(_through_root)
    try:
        with used(console), redirected(path):
            yield path
    finally:
        loud.removeFilter(_through_root)
        threading.excepthook = hook
        logging.captureWarnings(False)
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        ours.setLevel(before[2])
        for handler in handlers:
            handler.close()


def _through_root(record: logging.LogRecord) -> bool:
    """Filter for a logger that gets a handler of its own when imported: passes its records to the root's handlers."""
    logging.getLogger().handle(record)
    return False


def _log_dead_thread(died: Any) -> None:
    """Log the exception of a thread; standard error, where it would go, is redirected during a run."""
    if died.exc_type is not SystemExit:
        name = died.thread.name if died.thread is not None else "?"
        exception = (died.exc_type, died.exc_value, died.exc_traceback)
        logging.getLogger(__name__).error("thread %s died: %s", name, died.exc_value, exc_info=exception)


class Heartbeat:
    """Writes a line while a step runs and nothing else is written, and calls `every_tick`; context manager.

    Args:
        console: takes the line.
        name: the step.
        uri: its directory; growth of its `metrics.jsonl` counts as a line.
        memory_mb: memory of the run right now.
        every_tick: called about every `QUIET_SECONDS`, for records and MLflow; an error is logged once, and the run
            continues.
    """

    def __init__(
        self, console: Console, name: str, uri: str, memory_mb: Callable[[], float], every_tick: Callable[[], None]
    ) -> None:
        self._console, self._name, self._memory, self._every_tick = console, name, memory_mb, every_tick
        self._metrics = storage.local_path(uri) / METRICS if storage.is_local(uri) else None
        self._size = 0
        self._grew = self._started = time.monotonic()
        self._warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._size = self._metrics_size()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._console.clear()

    def _metrics_size(self) -> int:
        try:
            return self._metrics.stat().st_size if self._metrics is not None else 0
        except OSError:
            return 0

    def _beat(self) -> None:
        ticked = time.monotonic()
        while not self._stop.wait(TICK_SECONDS):
            now = time.monotonic()
            if (size := self._metrics_size()) != self._size:
                self._size, self._grew = size, now
            if self._silent(now):
                detail = f"; {self._console.detail}" if self._console.is_terminal and self._console.detail else ""
                beat = f"  {self._name}: {now - self._started:.0f} s, {self._memory() / 1024:.1f} GiB{detail}"
                self._console.status(beat)
            if now - ticked >= QUIET_SECONDS:
                ticked = now
                self._tick()

    def _silent(self, now: float) -> bool:
        """True when no line was written lately and no optimiser step ended lately (training writes those lines)."""
        quiet = TICK_SECONDS / 2 if self._console.is_terminal else QUIET_SECONDS
        idle = self._grew == self._started or now - self._grew >= 3 * QUIET_SECONDS
        return idle and now - self._console.spoke >= quiet

    def _tick(self) -> None:
        try:
            self._every_tick()
        except Exception as error:
            if not self._warned:
                logging.getLogger(__name__).warning("%s: %s: %s", self._name, type(error).__name__, error)
            self._warned = True
