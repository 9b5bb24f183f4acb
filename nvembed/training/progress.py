"""Progress of a training run on the terminal: step, loss, rate, tokens, time left, age of the last checkpoint.

Read from `metrics.jsonl`, whose rows have the seconds of each step: the rate is right from a resumed run's first line.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from nvembed.core import storage, terminal
from nvembed.core.steps import MANIFEST
from nvembed.core.terminal import Console, clock

POLL_SECONDS = 0.5
LINE_SECONDS = 5.0
WINDOW = 20  # steps the rate is taken from
TAIL_BYTES = 16_384
CHECKPOINTS = "checkpoints"


class Progress:
    """Follower of a local `metrics.jsonl`: a progress bar on a terminal, a line every few seconds elsewhere.

    Args:
        name: the pipeline step, shown before the optimiser step.
        metrics_uri: the file; at other URIs, where lines appear at checkpoints only, nothing is shown.
        num_steps: optimiser steps of the stage.
        console: the running command's by default.
    """

    def __init__(self, name: str, metrics_uri: str, num_steps: int, console: Console | None = None) -> None:
        self._name = name
        self._path = storage.local_path(metrics_uri) if storage.is_local(metrics_uri) else None
        self._num_steps = num_steps
        self._console = console or terminal.current()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._shown = -1

    def __enter__(self) -> Progress:
        if self._path is not None:
            rows = self._newest()
            self._shown = (
                int(rows[-1]["step"]) if rows else -1
            )  # the rows of an earlier run are not progress of this one
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._path is not None:
            self._thread.join()
            self._console.clear()
            self._show(last=True)

    def _follow(self) -> None:
        wait = POLL_SECONDS if self._console.is_terminal else LINE_SECONDS
        while not self._stop.wait(wait):
            self._show()

    def _show(self, *, last: bool = False) -> None:
        rows = self._newest()
        if not rows or (rows[-1]["step"] == self._shown and not (last and self._console.is_terminal)):
            return
        fresh = rows[-1]["step"] != self._shown
        self._shown = int(rows[-1]["step"])
        count, fields = describe(rows, self._num_steps, self._saved_seconds_ago())
        if self._console.is_terminal and not last:
            self._console.progress(self._name, self._shown + 1, self._num_steps, fields)
        elif fresh or last:
            self._console.line(f"{self._name}: step {count}, {', '.join(fields)}")

    def _saved_seconds_ago(self) -> float | None:
        assert self._path is not None
        try:
            stamps = [path.stat().st_mtime for path in (self._path.parent / CHECKPOINTS).glob(f"step-*/{MANIFEST}")]
        except OSError:
            return None
        return max(0.0, time.time() - max(stamps)) if stamps else None

    def _newest(self) -> list[dict[str, Any]]:
        assert self._path is not None
        return read_rows(self._path)


def describe(rows: list[dict[str, Any]], num_steps: int, saved_seconds_ago: float | None) -> tuple[str, list[str]]:
    """`12/70`, and the fields to show, the most important first."""
    last = rows[-1]
    done = int(last["step"]) + 1
    timed = [row for row in rows if row.get("seconds")]
    fields = [f"loss {last['loss']:.4f}"]
    if timed:
        rate = statistics.median(row["seconds"] for row in timed)
        fields.insert(0, f"{clock(rate * (num_steps - done))} left")
        fields.append(f"{rate:.2f} s/step")
        if tokens := sum(row.get("tokens", 0) for row in timed):
            fields.append(f"{tokens / sum(row['seconds'] for row in timed):,.0f} tokens/s")
    if saved_seconds_ago is not None:
        fields.append(f"saved {clock(saved_seconds_ago)} ago")
    return f"{done}/{num_steps}", fields


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The last complete rows of a `metrics.jsonl`, at most `WINDOW`; empty where there are none."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            start = max(0, file.tell() - TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")[:-1]  # without the piece after the last newline
    except OSError:
        return []
    rows = []
    for line in lines[1:] if start else lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            return rows[-WINDOW:]
    return rows[-WINDOW:]
