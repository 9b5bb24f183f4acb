"""This process, its user and machine, and the code it runs: versions, freed memory, progress bars of transformers."""

from __future__ import annotations

import ctypes
import gc
import getpass
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def git_revision(folder: Path | None = None) -> str | None:
    """Revision of a checkout (by default the one this package runs from), `-dirty` added when it has changes.

    None outside a checkout. Writes nothing: `git describe --dirty` would refresh git's index.
    """

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        place = folder or Path(__file__).parent
        return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        return f"{revision}-dirty" if git("status", "--porcelain", "--untracked-files=no") else revision
    except (OSError, subprocess.SubprocessError):
        return None


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def user_name() -> str:
    """The user of this process; its number in a container run under one that /etc/passwd does not know."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def processor_name() -> str:
    """The processor's name, from /proc/cpuinfo where there is one."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor_flags() -> frozenset[str]:
    """The processor's instruction sets by the kernel's names; empty where there is no /proc."""
    facts = _cpuinfo()
    return frozenset(facts.get("flags", facts.get("Features", "")).split())


def _cpuinfo() -> dict[str, str]:
    """The first value of every key of /proc/cpuinfo."""
    facts: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def trim() -> None:
    """Return freed pages to the system; nothing where the C library is not glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def give_back() -> None:
    """Collect garbage, then `trim` (395 MiB after the quickstart's `initialise`)."""
    gc.collect()
    trim()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch transformers' own bars off inside the block, and back to what they were."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
