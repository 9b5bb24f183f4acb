"""Ctrl-C and SIGTERM: the first requests a stop, a second one or the end of the grace time forces it.

Ray and Ray Train put their own handlers in place of ours (`ray.init` for SIGTERM, `fit` for SIGINT), and a handler in
Python waits for as long as the main thread is busy in C++. Hence the wake-up descriptor: the interpreter writes every
signal's number into it at once, whichever handler is installed, and a thread reads it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

import psutil

GRACE_SECONDS = 8.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_quietly_on_interrupt() -> None:
    """Let Ctrl-C end this process at once, with 130 and no traceback, until `Interrupts` takes over.

    For commands, before they load their libraries: nothing has been written yet that would need tidying up.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end_quietly)


def _end_quietly(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


class Interrupts:
    """Context manager for the main thread; raises KeyboardInterrupt in it when a stop is requested.

    Args:
        write: takes the sentence that says what happens.
        on_force: called right before a forced end of the process (exit code 130), after its children were killed.
        promise: that sentence.
        grace: seconds from the request to the forced end. None never forces: for a Python caller, whose process goes
            on; every Ctrl-C then raises. In another thread than the main one, which cannot have handlers, it does
            nothing.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        on_force: Callable[[], None],
        *,
        promise: str = "stopping; the next run resumes here",
        grace: float | None = GRACE_SECONDS,
    ) -> None:
        self._write, self._on_force, self._promise, self._grace = write, on_force, promise, grace
        self._requested_at = 0.0
        self._raised = False
        self._reader, self._writer = -1, -1
        self._handlers_before: dict[int, object] = {}
        self._wakeup_before = -1

    @property
    def requested(self) -> bool:
        """True once a stop was requested."""
        return self._requested_at > 0 or self._raised

    def __enter__(self) -> Interrupts:
        if self._grace is None and threading.current_thread() is not threading.main_thread():
            return self
        self._handlers_before = {number: signal.getsignal(number) for number in SIGNALS}
        self.arm()
        if self._grace is not None:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="interrupts", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.requested and self._grace is not None:
            return  # stay on guard: leaving the interpreter may hang too
        if self._grace is not None:
            signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._grace is not None:
            os.close(self._writer)  # ends the thread

    def arm(self) -> None:
        """Put our handlers (back) in place; libraries replace them."""
        for number in self._handlers_before:
            signal.signal(number, self._handle)

    def check(self) -> None:
        """Raise KeyboardInterrupt when a library swallowed the one that was raised."""
        if self.requested:
            self._raised = True
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # under a grace time, a second exception would only break the clean-up that the first one started
        if not self._raised or self._grace is None:
            self._raised = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while data := os.read(self._reader, 1):
            if data[0] not in SIGNALS:
                continue
            if self._requested_at:
                self._write("stopping now")
                self._force()
            self._requested_at = time.monotonic()
            self._write(f"{self._promise} (once more to stop at once)")
            threading.Thread(target=self._wait, name="interrupts-grace", daemon=True).start()
        os.close(self._reader)

    def _wait(self) -> None:
        assert self._grace is not None
        time.sleep(self._grace)
        self._write(f"not stopped after {self._grace:g} s: ended by force; what was saved stays")
        self._force()

    def _force(self) -> None:
        end_processes(psutil.Process().children(recursive=True), patience=0.0)
        try:
            self._on_force()
        finally:
            os._exit(130)


def end_processes(processes: Sequence[psutil.Process], patience: float) -> None:
    """Kill those of our processes that do not end by themselves within `patience` seconds."""
    _, alive = psutil.wait_procs(processes, timeout=patience)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
