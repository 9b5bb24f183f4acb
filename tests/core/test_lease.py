"""One run per output: who is refused, who takes over, and that kill -9 never blocks a resume."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nvembed.core import lease, storage
from nvembed.core.lease import LEASE, Lease, LeaseHeldError, LeaseLostError, check_fence
from nvembed.types import UserError

HOLD = """
import sys, time
from nvembed.core.lease import Lease
with Lease(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts processes that hold an output until they are killed."""
    started: list[subprocess.Popen[str]] = []

    def start(out: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def record(out: Path | str) -> dict[str, Any]:
    return dict(storage.read_json(storage.join(str(out), LEASE)))


def test_a_second_run_is_refused_with_its_holder(tmp_path: Path, holder: Callable[[Path], Any]) -> None:
    process = holder(tmp_path)
    with pytest.raises(LeaseHeldError, match=rf"in use by \S+ on \S+, pid {process.pid} \(seen \d s ago\)"):
        Lease(str(tmp_path)).__enter__()
    assert record(tmp_path)["fence"] == 1


def test_the_same_process_cannot_hold_twice(tmp_path: Path) -> None:
    with Lease(str(tmp_path)), pytest.raises(LeaseHeldError, match=str(os.getpid())):
        Lease(str(tmp_path)).__enter__()


def test_kill_9_of_the_holder_never_blocks(tmp_path: Path, holder: Callable[[Path], Any]) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    started = time.monotonic()
    with Lease(str(tmp_path)) as taken:
        assert taken.fence == 2
        assert time.monotonic() - started < 2


def test_a_zombie_holder_never_blocks(tmp_path: Path, holder: Callable[[Path], Any]) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)  # and no wait(): its pid lives on as a zombie
    deadline = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    with Lease(str(tmp_path)) as taken:
        assert taken.fence == 2


def test_a_stopped_holder_still_holds(tmp_path: Path, holder: Callable[[Path], Any]) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(LeaseHeldError):
        Lease(str(tmp_path)).__enter__()


@pytest.mark.parametrize("store", ["local", "memory"])
def test_the_fencing_number_grows_with_every_taker(tmp_path: Path, store: str) -> None:
    out = str(tmp_path) if store == "local" else f"memory://{uuid.uuid4().hex}"
    seen = []
    for _ in range(3):
        with Lease(out) as taken:
            seen.append(taken.fence)
        assert record(out)["released"] is True
    assert seen == [1, 2, 3]


def test_of_many_takers_at_once_exactly_one_holds(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom nvembed.core.lease import Lease, LeaseHeldError\n"
        "sys.stdin.readline()\n"
        "try:\n    Lease(sys.argv[1]).__enter__()\nexcept LeaseHeldError:\n    print('refused', flush=True)\nelse:\n"
        "    print('held', flush=True)\nsys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    takers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(4)
    ]
    for taker in takers:
        assert taker.stdin is not None
        taker.stdin.write("go\n")
    said = sorted(str(taker.stdout.readline()).strip() for taker in takers if taker.stdout is not None)
    for taker in takers:
        taker.communicate("end\n")
    assert said == ["held", "refused", "refused", "refused"]


def write_holder(out: Path, *, age: float = 0.0, **changes: Any) -> None:
    """A lease as another holder would have left it."""
    held = {"host": lease.socket.gethostname(), "boot_id": lease.boot_id(), "pid": os.getpid(), "user": "somebody"}
    held["pid_started"] = lease._started(os.getpid())
    text = json.dumps({"holder": {**held, **changes}, "heartbeat": time.time() - age, "fence": 41, "token": "t"})
    out.mkdir(exist_ok=True)
    (out / LEASE).write_text(text)


@pytest.mark.parametrize("change", [{"boot_id": "another boot"}, {"pid": 2**22 + 5}, {"pid_started": 1.0}])
def test_a_holder_that_cannot_be_alive_is_taken_over_at_once(tmp_path: Path, change: dict[str, Any]) -> None:
    write_holder(tmp_path, **change)  # rebooted, pid gone, pid reused: whatever the heartbeat says
    with Lease(str(tmp_path)) as taken:
        assert taken.fence == 42


def test_a_holder_on_another_host_is_believed_while_its_heart_beats(tmp_path: Path) -> None:
    write_holder(tmp_path, host="elsewhere", age=lease.STALE_SECONDS - 10)
    with pytest.raises(LeaseHeldError, match="somebody on elsewhere"):
        Lease(str(tmp_path)).__enter__()


def test_a_silent_holder_on_another_host_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)
    write_holder(tmp_path, host="elsewhere", age=lease.STALE_SECONDS + 10)
    with Lease(str(tmp_path)) as taken:
        assert taken.fence == 42


def test_a_slow_clock_elsewhere_is_not_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_holder(tmp_path, host="elsewhere", age=3600)
    real = time.sleep

    def beat_meanwhile(seconds: float) -> None:
        write_holder(tmp_path, host="elsewhere", age=3600 - seconds)
        real(0.001)

    monkeypatch.setattr(lease.time, "sleep", beat_meanwhile)
    with pytest.raises(LeaseHeldError, match="somebody on elsewhere"):
        Lease(str(tmp_path)).__enter__()
    assert record(tmp_path)["fence"] == 41


def test_the_heart_beats_and_stops_after_a_takeover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)
    with Lease(str(tmp_path)) as ours:
        first = record(tmp_path)["heartbeat"]
        deadline = time.monotonic() + 10
        while record(tmp_path)["heartbeat"] == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert record(tmp_path)["heartbeat"] > first
        check_fence(str(tmp_path), ours.fence)
        write_holder(tmp_path, host="elsewhere")
        assert ours._thread is not None
        ours._thread.join(timeout=10)
        assert not ours._thread.is_alive()
        with pytest.raises(LeaseLostError, match="fence 41, ours 1"):
            check_fence(str(tmp_path), ours.fence)
    assert record(tmp_path)["holder"]["user"] == "somebody", "leaving does not release what others hold"


def test_a_damaged_lease_is_an_error(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text("[]")
    with pytest.raises(UserError, match="Delete it when no run uses the output"):
        Lease(str(tmp_path)).__enter__()


def test_a_user_without_a_name_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    with Lease(str(tmp_path)):
        assert record(tmp_path)["holder"]["user"] == str(os.getuid())
