"""`metrics.jsonl`: the truth about a run, one line per optimiser step (`step` counts from 0), each step exactly once.

A local file is appended to. Other URIs have no append: the lines stay in memory until a checkpoint writes the file.
Only rank 0 writes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from nvembed.core import storage

logger = logging.getLogger(__name__)


def hash_ids(example_ids: Sequence[str]) -> str:
    """SHA-256 of the global batch's example ids, one per line, in order."""
    return hashlib.sha256("\n".join(example_ids).encode()).hexdigest()


class MetricsLog:
    """Writer of one run's `metrics.jsonl`.

    Opening it drops every line from `start` on (steps that came after the checkpoint the run continues from, and
    a line torn by a kill), so that each step has one line after it is done again.

    Args:
        uri: the file.
        start: first optimiser step that will be appended.
    """

    def __init__(self, uri: str, start: int) -> None:
        self._uri = uri
        self._local = storage.is_local(uri)
        self._lines = [line for line in _complete_lines(uri) if json.loads(line)["step"] < start]
        steps = [json.loads(line)["step"] for line in self._lines]
        if steps != list(range(start)):
            logger.warning("%s: the steps before %d are not all there; it was changed from outside", uri, start)
        self._write_all()
        self._file = open(storage.local_path(uri), "a", encoding="utf-8") if self._local else None  # noqa: SIM115

    def append(self, row: Mapping[str, Any]) -> None:
        """Add the line of one optimiser step."""
        line = json.dumps(row) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        else:
            self._lines.append(line)

    def flush(self) -> None:
        """Make every line so far visible at the URI; called before a checkpoint is published."""
        if self._file is None:
            self._write_all()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        if self._file is not None:
            self._file.close()

    def _write_all(self) -> None:
        storage.write_bytes(self._uri, "".join(self._lines).encode())


def record_start(uri: str, row: Mapping[str, Any]) -> None:
    """Add a line to `starts.jsonl`: where and when a run started or went on (restart marks of a report)."""
    before = storage.read_bytes(uri) if storage.exists(uri) else b""
    storage.write_bytes(uri, before + (json.dumps(row) + "\n").encode())


def _complete_lines(uri: str) -> list[str]:
    """Lines that end and parse; a torn last line is left out."""
    if not storage.exists(uri):
        return []
    lines = storage.read_bytes(uri).decode(errors="replace").splitlines(keepends=True)
    complete = []
    for number, line in enumerate(lines):
        try:
            json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            if number + 1 < len(lines):
                logger.warning("%s: line %d cannot be read; it and what follows is dropped", uri, number + 1)
            break
        complete.append(line if line.endswith("\n") else line + "\n")
    return complete
