"""The commands of others that a target is driven by: kubectl, sbatch, ray."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from nvembed.preflight.packages import PreflightError

SECONDS = 120.0
PATIENCE_SECONDS = 600.0

T = TypeVar("T")


class ToolError(PreflightError):
    """A tool that is there failed or did not answer; asking again may help."""


def patiently(ask: Callable[[], T], job_id: str, say: Callable[[str], None], seconds: float | None = None) -> T:
    """What a tool answers about a job that is followed; a cluster that does not answer for a while is asked again.

    Raises:
        PreflightError: the tool is not installed, or failed for `seconds` (`PATIENCE_SECONDS`) on end.
    """

    def lost(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        say(f"{job_id}: no answer ({str(error).splitlines()[0][:200]}); the job goes on, trying again")

    retrying = Retrying(
        retry=retry_if_exception_type(ToolError),
        wait=wait_exponential_jitter(initial=1, max=20),
        stop=stop_after_delay(PATIENCE_SECONDS if seconds is None else seconds),
        before_sleep=lost,
        reraise=True,
    )
    return retrying(ask)


def run_tool(command: Sequence[str], *, hint: str, stdin: str | None = None) -> str:
    """Stdout of a tool.

    Raises:
        PreflightError: it is not installed (`hint` says where to get it).
        ToolError: it failed (with its own words), or hangs.
    """
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError as error:
        raise PreflightError(f"{command[0]} is not installed here. {hint}") from error
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{command[0]} did not answer in {SECONDS:g} s. {hint}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise ToolError(f"{' '.join(command[:3])} failed ({done.returncode}): {said}")
    return done.stdout
