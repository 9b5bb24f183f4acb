"""What the terminal shows of a running stage: step, loss, rate, time left; read from `metrics.jsonl`."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TextIO

from nvembed import storage

POLL_SECONDS = 0.5
LINE_SECONDS = 5.0


class Progress:
    """Follows a local `metrics.jsonl` while it is open: one changing line on a terminal, else a line every few seconds.

    Args:
        name: what stands before the step.
        metrics_uri: the file; at other URIs, where lines appear at checkpoints only, nothing is shown.
        num_steps: optimiser steps of the stage.
        out: defaults to standard error.
    """

    def __init__(self, name: str, metrics_uri: str, num_steps: int, out: TextIO | None = None) -> None:
        self._name = name
        self._path = storage.local_path(metrics_uri) if storage.is_local(metrics_uri) else None
        self._num_steps = num_steps
        self._out = out or sys.stderr
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._times: list[tuple[int, float]] = []
        self._shown = -1

    def __enter__(self) -> Progress:
        if self._path is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._path is not None:
            self._thread.join()
            self._show(last=True)

    def _follow(self) -> None:
        wait = POLL_SECONDS if self._out.isatty() else LINE_SECONDS
        while not self._stop.wait(wait):
            self._show()

    def _show(self, *, last: bool = False) -> None:
        row = self._newest()
        if row is None or row["step"] == self._shown:
            return
        self._shown = int(row["step"])
        text = f"{self._name}: {self.describe(self._shown, row['loss'], time.monotonic())}"
        if self._out.isatty():
            self._out.write(f"\r\033[K{text}" + ("\n" if last else ""))
        else:
            self._out.write(text + "\n")
        self._out.flush()

    def describe(self, step: int, loss: float, now: float) -> str:
        """`step 12/110, loss 1.2345, 3.21 s/step, 5:14 left`; the rate is that of the last steps seen."""
        self._times = [*self._times[-20:], (step, now)]
        text = f"step {step + 1}/{self._num_steps}, loss {loss:.4f}"
        steps = step - self._times[0][0]
        if steps > 0:
            rate = (now - self._times[0][1]) / steps
            left = int(rate * (self._num_steps - step - 1))
            text += f", {rate:.2f} s/step, {left // 60}:{left % 60:02d} left"
        return text

    def _newest(self) -> dict[str, float] | None:
        assert self._path is not None
        try:
            with open(self._path, "rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - 4096))
                lines = file.read().split(b"\n")
        except OSError:
            return None
        if len(lines) < 2:
            return None
        try:
            row: dict[str, float] = json.loads(lines[-2])  # the last piece is what stands after the last newline
        except ValueError:
            return None
        return row
