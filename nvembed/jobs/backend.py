"""The interface of all backends, the state of a job, and shared parts: ids, YAML, commands of other tools."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

import yaml
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from nvembed.jobs.command import Job
from nvembed.preflight.findings import PreflightError
from nvembed.types import UserError

PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED = "pending", "running", "succeeded", "failed", "stopped"
ALIVE = (PENDING, RUNNING)

Say = Callable[[str], None]
TOOL_SECONDS = 120.0
RETRY_SECONDS = 600.0

T = TypeVar("T")


@dataclass(frozen=True)
class JobState:
    """A job on a target. Times are ISO 8601, UTC; `exit_code` is the driver's own, None while it runs.

    `message` is one line of the scheduler; never the end of the log, which may hold texts of the data.
    """

    id: str
    state: str
    message: str = ""
    started: str | None = None
    ended: str | None = None
    exit_code: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ALIVE

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Preview:
    """A job as it would be submitted: as plain values and as text."""

    value: dict[str, Any]
    text: str


class Backend(Protocol):
    """The operations of a kind of target. All but `preview` connect to it and raise PreflightError where that fails."""

    def preview(self, job: Job) -> Preview:
        """The job as it would be submitted; only reads files."""

    def submit(self, job: Job, say: Say) -> str:
        """Submit the job; returns its id. UserError when the same run is alive already."""

    def follow(self, job_id: str, write: Say, say: Say) -> int:
        """Write the log until the job ends; returns the driver's exit code."""

    def states(self) -> list[JobState]:
        """Jobs of nvembed, oldest first."""

    def logs(self, job_id: str) -> str:
        """The log of the job so far."""

    def stop(self, job_id: str) -> None:
        """Stop the job."""


def without_log(message: str | None) -> str:
    """A scheduler's message about an ended job without the log that Ray appends to it."""
    return (message or "").partition("\n")[0].partition(", last available logs")[0].strip()


def refuse_if_alive(job: Job, states: Sequence[JobState]) -> None:
    """Refuse a second live run of one output: the two would compete for its lease.

    Raises:
        UserError: the same run, or another one with the same output, is alive; the message has its id.
    """
    for state in states:
        same = state.metadata.get("nvembed_fingerprint") == job.fingerprint
        if state.alive and (same or state.metadata.get("nvembed_out") == job.out):
            what = "this run is" if same else f"another run with the output {job.out} is"
            raise UserError(
                f"{what} {state.state} as {state.id}. Follow it with `nvembed jobs logs`, or stop it first."
            )


def next_try(base: str, states: Sequence[JobState]) -> str:
    """The next free id `<base>-<try>`."""
    parts = [state.id.rpartition("-") for state in states]
    tries = [int(number) for head, _, number in parts if head == base and number.isdigit()]
    return f"{base}-{max(tries, default=0) + 1}"


def choose(states: Sequence[JobState], job_id: str | None, *, alive: bool) -> JobState:
    """The job with this id; without an id the newest one (with `alive`: the only one that is alive).

    Raises:
        UserError: there is none, or more than one.
    """
    if job_id is not None:
        for state in states:
            if state.id == job_id:
                return state
        listed = ", ".join(state.id for state in states[-5:]) or "none"
        raise UserError(f"{job_id}: no such job of nvembed here. The newest: {listed}")
    candidates = [state for state in states if state.alive or not alive]
    if not candidates:
        raise UserError("no job of nvembed is alive here" if alive else "no job of nvembed here")
    if alive and len(candidates) > 1:
        raise UserError(f"which job? Alive are: {', '.join(state.id for state in candidates)}")
    return candidates[-1]


# -- YAML -------------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def as_yaml(*documents: Any) -> str:
    """YAML of one or several documents: keys in their order, no anchors, texts of several lines as blocks."""
    return "---\n".join(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120) for value in documents)


# -- the commands of others: kubectl, sbatch, ray ---------------------------------------------------------------------


class ToolError(PreflightError):
    """An installed tool failed or did not answer; another attempt may succeed."""


def retry_tool(call: Callable[[], T], job_id: str, say: Say, seconds: float | None = None) -> T:
    """The result of a call about a job that is followed; retried while the cluster does not answer.

    Raises:
        PreflightError: the tool is not installed, or failed for `seconds` (`RETRY_SECONDS`) on end.
    """

    def lost(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        say(f"{job_id}: no answer ({str(error).splitlines()[0][:200]}); the job continues, trying again")

    retrying = Retrying(
        retry=retry_if_exception_type(ToolError),
        wait=wait_exponential_jitter(initial=1, max=20),
        stop=stop_after_delay(RETRY_SECONDS if seconds is None else seconds),
        before_sleep=lost,
        reraise=True,
    )
    return retrying(call)


def run_tool(command: Sequence[str], *, hint: str, stdin: str | None = None) -> str:
    """Stdout of a tool.

    Raises:
        PreflightError: it is not installed (`hint` says how to install it).
        ToolError: it failed (with its own message) or did not answer.
    """
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    except FileNotFoundError as error:
        raise PreflightError(f"{command[0]} is not installed here. {hint}") from error
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{command[0]} did not answer in {TOOL_SECONDS:g} s. {hint}") from error
    if done.returncode:
        message = (done.stderr or done.stdout).strip()[-2000:]
        raise ToolError(f"{' '.join(command[:3])} failed ({done.returncode}): {message}")
    return done.stdout
