"""One run per output: a lease with a holder, a heartbeat and a fencing number.

A lease of a process that is gone (other boot, dead pid, reused pid) is taken over at once, so a resume after kill -9
is never blocked. A holder on another host counts as dead when its heartbeat is older than `STALE_SECONDS`
and none comes while it is watched (clocks of hosts may differ).
Every taker adds one to the fencing number; workers check it before they write, so an orphan of a killed run stops
itself instead of writing beside the resumed one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from nvembed.core import storage
from nvembed.core.runtime import user_name
from nvembed.types import UserError

LEASE = ".lease.json"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
SILENCE_BEATS = 2.5  # how long a stale holder on another host is watched before its output is taken over


class LeaseHeldError(UserError):
    """Another live run holds the output."""


class LeaseLostError(RuntimeError):
    """Another run has taken the output over; this process must stop writing."""


def boot_id() -> str:
    """Identity of this boot of this machine (a container that restarts gets new pids on the same boot)."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else str(psutil.boot_time())


def _holder() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot_id": boot_id(),
        "pid": os.getpid(),
        "pid_started": _started(os.getpid()),
        "user": user_name(),
    }


def _started(pid: int) -> float:
    """When a process started, in a unit that only compares within one boot.

    Clock ticks since boot where there is /proc: psutil's `create_time` follows the system clock, so one step of NTP
    would make a live holder look like a reused pid.
    """
    try:
        data = Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        return float(psutil.Process(pid).create_time())
    return float(data[data.rfind(b")") + 1 :].split()[19])


def _read(file: str) -> dict[str, Any] | None:
    """The current lease; None where there is none.

    Raises:
        UserError: the file is not a lease.
    """
    if not storage.exists(file):
        return None
    try:
        record = storage.read_json(file)
        if not {"holder", "heartbeat", "fence"} <= set(record):
            raise ValueError("not a lease")
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}). Delete it when no run uses the output.") from error
    return dict(record)


def _alive(record: dict[str, Any]) -> bool:
    if record.get("released"):
        return False
    holder = record["holder"]
    if holder["host"] != socket.gethostname():
        return time.time() - record["heartbeat"] < STALE_SECONDS
    if holder["boot_id"] != boot_id():
        return False
    try:
        if _started(holder["pid"]) != holder["pid_started"]:
            return False
        return bool(psutil.Process(holder["pid"]).status() != psutil.STATUS_ZOMBIE)
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
        self._wait_for_silence()
        with _exclusive(self.uri):
            record = _read(self._file)
            if record is not None and _alive(record):
                raise _in_use_error(self.uri, record)
            self.fence = (record["fence"] if record else 0) + 1
            self._write()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()
        return self

    def _wait_for_silence(self) -> None:
        """A holder on another host that looks dead may only have a slow clock: wait for one more heartbeat."""
        record = _read(self._file)
        if (
            record is None
            or record.get("released")
            or _alive(record)
            or record["holder"]["host"] == socket.gethostname()
        ):
            return
        time.sleep(SILENCE_BEATS * HEARTBEAT_SECONDS)
        again = _read(self._file)
        if again is not None and again["heartbeat"] != record["heartbeat"] and not again.get("released"):
            raise _in_use_error(self.uri, again)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self._renew()
            except LeaseLostError:
                return
            except (OSError, UserError):  # storage away for a moment: the next beat tries again
                continue

    def _renew(self, **more: Any) -> None:
        with _exclusive(self.uri):  # or a taker could write between our look and our write
            check_fence(self.uri, self.fence)
            self._write(**more)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        with contextlib.suppress(LeaseLostError, OSError, UserError):
            self._renew(released=True)


def _in_use_error(uri: str, record: dict[str, Any]) -> LeaseHeldError:
    holder = record["holder"]
    return LeaseHeldError(
        f"{uri} is in use by {holder['user']} on {holder['host']}, pid {holder['pid']} "
        f"(seen {max(0.0, time.time() - record['heartbeat']):.0f} s ago). Wait for it, stop it, or use another --out."
    )


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
