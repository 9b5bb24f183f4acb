"""Memory of a run: the sum of PSS over its processes, sampled every second, object store included.

PSS divides a shared page among the processes that map it, so the sum counts it once; pages of Ray's object store are
in the PSS of the processes that map them. The processes are this one and its descendants: with a cluster at RAY_ADDRESS
only the driver is measured.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PERIOD_SECONDS = 1.0
REFRESH_SAMPLES = 15  # a process whose resident size does not change is measured again after this many samples
MOVED_PAGES = 256  # 1 MiB
_SMAPS_KEY = b"Pss:"


def process_tree(root: int) -> list[int]:
    """Process ids of `root` and its descendants, from /proc (psutil builds an object per process: 4 times dearer)."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (parent := _parent(entry.name)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    tree, queue = [], [root]
    while queue:
        process = queue.pop()
        tree.append(process)
        queue += children.get(process, [])
    return tree


def _parent(process: str) -> int | None:
    data = _read(f"/proc/{process}/stat")
    # the command name is in parentheses and may hold anything, parentheses too
    return int(data[data.rfind(b")") + 1 :].split()[1]) if data else None


def pss_bytes(process: int) -> int:
    """Proportional set size of a process; 0 when it is gone or not ours to see."""
    for line in _read(f"/proc/{process}/smaps_rollup").splitlines():
        if line.startswith(_SMAPS_KEY):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


class MemoryMeter:
    """Samples the process tree in a thread; context manager.

    Reading a big process's page tables takes milliseconds, so a process is measured again only when its resident size
    has changed by 1 MiB, or after `REFRESH_SAMPLES`.

    Attributes:
        peak_mb: highest sum seen so far, MiB.
        current_mb: the last sum.
    """

    def __init__(self, root: int | None = None, period: float = PERIOD_SECONDS) -> None:
        self.peak_mb = 0.0
        self.current_mb = 0.0
        self._root = os.getpid() if root is None else root
        self._period = period
        self._known: dict[int, tuple[int, int, int]] = {}  # pid -> (resident pages, PSS, samples since measured)
        self._open: list[list[float]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-meter", daemon=True)

    def __enter__(self) -> MemoryMeter:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self.sample()

    @contextmanager
    def span(self) -> Iterator[list[float]]:
        """Peak of a stretch of the run: a list whose one item is the peak in MiB, updated until the stretch ends."""
        self.sample()
        peak = [self.current_mb]
        with self._lock:
            self._open.append(peak)
        try:
            yield peak
        finally:
            self.sample()
            with self._lock:
                self._open = [other for other in self._open if other is not peak]

    def sample(self) -> float:
        """Measure now; the sum in MiB."""
        with self._lock:
            measured = {process: self._measure(process) for process in process_tree(self._root)}
            self._known = {process: entry for process, entry in measured.items() if entry is not None}
            self.current_mb = sum(entry[1] for entry in self._known.values()) / 2**20
            self.peak_mb = max(self.peak_mb, self.current_mb)
            for peak in self._open:
                peak[0] = max(peak[0], self.current_mb)
            return self.current_mb

    def _measure(self, process: int) -> tuple[int, int, int] | None:
        statm = _read(f"/proc/{process}/statm").split()
        if not statm:
            return None
        resident = int(statm[1])
        known = self._known.get(process)
        if known is not None and abs(known[0] - resident) < MOVED_PAGES and known[2] < REFRESH_SAMPLES:
            return known[0], known[1], known[2] + 1
        return resident, pss_bytes(process), 0
