"""Ctrl-C and SIGTERM: the first asks the run to stop, a second one or the end of the grace time forces it (layer 6).

Ray and Ray Train put their own handlers in place of ours (`ray.init` for SIGTERM, `fit` for SIGINT), and a handler in
Python waits for as long as the main thread is busy in C++. Hence the wake-up descriptor: the interpreter writes every
signal's number into it at once, whoever's handler it is, and a thread reads it.
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


class Interrupts:
    """Context manager for the main thread; raises KeyboardInterrupt in it when asked to stop.

    Args:
        say: told in one sentence what happens.
        promise: what that sentence says.
        on_force: called right before a forced end of the process (exit code 130), after its children were killed.
        grace: seconds between being asked and being forced.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        on_force: Callable[[], None],
        *,
        promise: str = "stopping; the next run resumes here",
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._say, self._on_force, self._promise, self._grace = say, on_force, promise, grace
        self._asked_at = 0.0
        self._raised = False
        self._reader, self._writer = -1, -1
        self._before: dict[int, object] = {}
        self._wakeup_before = -1

    @property
    def asked(self) -> bool:
        """Whether somebody asked the run to stop."""
        return self._asked_at > 0 or self._raised

    def __enter__(self) -> Interrupts:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.arm()
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="interrupts", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.asked:
            return  # stay on guard: leaving the interpreter may hang too
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self._writer)  # ends the thread

    def arm(self) -> None:
        """Put our handlers (back) in place; libraries replace them."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def check(self) -> None:
        """Raise KeyboardInterrupt when a library swallowed the one that was raised."""
        if self.asked:
            self._raised = True
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._raised:  # a second exception would only break the clean-up that the first one started
            self._raised = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while data := os.read(self._reader, 1):
            if data[0] not in SIGNALS:
                continue
            if self._asked_at:
                self._say("stopping now")
                self._force()
            self._asked_at = time.monotonic()
            self._say(f"{self._promise} (once more to stop at once)")
            threading.Thread(target=self._wait, name="interrupts-grace", daemon=True).start()
        os.close(self._reader)

    def _wait(self) -> None:
        time.sleep(self._grace)
        self._say(f"not stopped after {self._grace:g} s: ended by force; what was saved stays")
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
