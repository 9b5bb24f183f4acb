"""What a run ran on: versions, processor, date. No user, host or path names."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import psutil

from nvembed.core.runtime import git_revision
from nvembed.report.schema import Environment

PACKAGES = (
    "nvembed", "torch", "transformers", "peft", "deepspeed", "ray", "datasets", "mlflow", "sentence-transformers",
    "tokenizers", "safetensors", "numpy", "scikit-learn", "pyarrow",
)  # fmt: skip


def describe_environment() -> Environment:
    """The environment of this process."""
    info = _processor_info()
    flags = set(info.get("flags", "").split())
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        platform=platform.platform(),
        processor=info.get("model name") or platform.processor() or platform.machine(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        bf16=bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        git_revision=git_revision(),
        packages={name: version for name in PACKAGES if (version := _version(name)) is not None},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor_info() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(errors="replace").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
