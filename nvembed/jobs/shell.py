"""The commands of others that a target is driven by: kubectl, sbatch, ray."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from nvembed.preflight import PreflightError

SECONDS = 120.0


def run_tool(command: Sequence[str], *, hint: str, stdin: str | None = None) -> str:
    """Stdout of a tool.

    Raises:
        PreflightError: it is not installed (`hint` says where to get it), failed (with its own words), or hangs.
    """
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError as error:
        raise PreflightError(f"{command[0]} is not installed here. {hint}") from error
    except subprocess.TimeoutExpired as error:
        raise PreflightError(f"{command[0]} did not answer in {SECONDS:g} s. {hint}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise PreflightError(f"{' '.join(command[:3])} failed ({done.returncode}): {said}")
    return done.stdout
