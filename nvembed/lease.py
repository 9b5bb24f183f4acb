"""One run per output: a lease with a holder, a heartbeat and a fencing number (layer 0).

A lease of a process that is gone (other boot, dead pid, reused pid) is taken over at once, so a resume after kill -9
is never blocked. A holder on another host is believed dead when its heartbeat is older than `STALE_SECONDS`.
Every taker adds one to the fencing number; workers check it before they write, so an orphan of a killed run stops
itself instead of writing beside the resumed one.
"""

from __future__ import annotations

import getpass
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from nvembed import storage

LEASE = ".lease.json"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


class LeaseHeldError(storage.UserError):
    """Another live run holds the output."""


class LeaseLostError(RuntimeError):
    """Another run has taken the output over; this process must stop writing."""


def boot_id() -> str:
    """Identity of this boot of this machine (a container that restarts gets new pids on the same boot)."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else str(psutil.boot_time())


def _holder() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "boot_id": boot_id(),
        "pid": process.pid,
        "pid_started": process.create_time(),
        "user": getpass.getuser(),
    }


def _alive(held: dict[str, Any]) -> bool:
    if held.get("released"):
        return False
    holder = held["holder"]
    if holder["host"] != socket.gethostname():
        return time.time() - held["heartbeat"] < STALE_SECONDS
    if holder["boot_id"] != boot_id():
        return False
    try:
        process = psutil.Process(holder["pid"])
        return abs(process.create_time() - holder["pid_started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_fence(uri: str, fence: int) -> None:
    """Raise LeaseLostError unless the lease of the output at `uri` still carries the fencing number `fence`."""
    try:
        current = storage.read_json(storage.join(uri, LEASE))["fence"]
    except (OSError, ValueError, KeyError):
        return  # no lease, or one in the middle of a rewrite on a store without rename
    if current != fence:
        raise LeaseLostError(f"{uri} was taken over by another run (fence {current}, ours {fence}); stopping.")


class Lease:
    """Context manager that holds an output directory; `fence` is its fencing number.

    Raises:
        LeaseHeldError: on entry, when a live run holds it; the message names the holder.
    """

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)
        self.fence = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._token = uuid.uuid4().hex

    @property
    def _file(self) -> str:
        return storage.join(self.uri, LEASE)

    def _write(self, **more: Any) -> None:
        record = {"holder": _holder(), "heartbeat": time.time(), "fence": self.fence, "token": self._token, **more}
        storage.write_json(self._file, record)

    def __enter__(self) -> Lease:
        storage.make_directory(self.uri)
        with _exclusive(self.uri):
            held = storage.read_json(self._file) if storage.exists(self._file) else None
            if held is not None and _alive(held):
                holder = held["holder"]
                raise LeaseHeldError(
                    f"{self.uri} is in use by {holder['user']} on {holder['host']}, pid {holder['pid']} "
                    f"(seen {time.time() - held['heartbeat']:.0f} s ago). Wait for it, stop it, or use another --out."
                )
            self.fence = (held["fence"] if held else 0) + 1
            self._write()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()
        return self

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                check_fence(self.uri, self.fence)
                self._write()
            except LeaseLostError:
                return
            except OSError:  # storage away for a moment: the next beat tries again
                continue

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        try:
            check_fence(self.uri, self.fence)
            self._write(released=True)
        except (LeaseLostError, OSError):
            pass


class _exclusive:
    """Makes read-check-write of a lease atomic among processes of one host; object stores have no such lock."""

    def __init__(self, uri: str) -> None:
        self._path = storage.local_path(uri) / ".lease.lock" if storage.is_local(uri) else None
        self._descriptor = -1

    def __enter__(self) -> None:
        if self._path is not None:
            import fcntl

            self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
