"""`type: slurm`: a batch job that makes a Ray cluster of its nodes, runs the pipeline on the first, and takes it down.

`ray symmetric-run` runs on every node. Before the time limit Slurm signals the batch shell (SIGUSR1); the shell signals
the run, which saves and ends, and the job is requeued and resumes. `scancel` does not requeue.

The state of a job comes from three places: the queue, accounting (where it is on), and `jobs/<id>/` on the shared
storage: `job.json` and `stopped` written here, `exit_code` by the job. Clusters without accounting forget ended jobs.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nvembed.core import storage
from nvembed.core.steps import RECIPE
from nvembed.jobs.backend import (
    FAILED,
    PENDING,
    RUNNING,
    STOPPED,
    SUCCEEDED,
    JobState,
    Preview,
    Say,
    refuse_if_alive,
    retry_tool,
    run_tool,
)
from nvembed.jobs.command import Job
from nvembed.jobs.config import SlurmTarget
from nvembed.jobs.slurm.script import BODY, FAILED_CODE
from nvembed.preflight.findings import PreflightError
from nvembed.recipe.schema import resolved_yaml

HINT = "Give the command on a login node of the cluster."
POLL_SECONDS = 5.0
ABOUT = "job.json"
STOPPED_MARK = "stopped"  # a job that never began leaves nothing else
INTERRUPTED = 130
EXPORTED = ("PATH", "HOME", "USER", "SHELL", "LANG", "MODULEPATH", "MODULESHOME", "LD_LIBRARY_PATH")
_PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "RESIZING", "SIGNALING", "STOPPED")
_SEEN = ("nvembed_recipe", "nvembed_fingerprint", "nvembed_out", "git_revision", "nvembed_recipe_sha256", "user")


def render_script(target: SlurmTarget, job: Job) -> str:
    """The batch script. Pure; holds no secret."""
    header = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(target, job))]
    command = job.with_resolved_recipe("@RECIPE@", job.script)
    argv = " ".join(f'"$job_dir/{RECIPE}"' if part == "@RECIPE@" else shlex.quote(part) for part in command)
    start = [
        f"--num-cpus={target.cpus_per_node}",
        f"--num-gpus={target.gpus_per_node}",
        '--temp-dir="$temp"',
        *(["--include-dashboard=false"] if target.nodes == 1 else []),  # an option of the head only
        *map(shlex.quote, target.ray_options),
    ]
    values = {
        "NAME": job.base,
        "SHARED": target.shared_dir,
        "TEMP": target.temp_dir.rstrip("/"),
        "SECRETS": "\n".join(_secrets(target)),
        "SETUP": "\n".join(target.setup),
        "VARIABLES": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in target.env_vars.items()),
        "HEAD": _head(target),
        "PORT": str(target.port) if target.port else FREE_PORT,
        "NODES": str(target.nodes),
        "CPUS": str(target.cpus_per_node),
        "WAIT": str(target.cluster_wait_seconds),
        "START": " ".join(start),
        "COMMAND": argv,
        "REQUEUES": str(target.max_requeues),
        "RECIPE_FILE": RECIPE,
        "RECIPE": resolved_yaml(job.recipe).rstrip("\n"),
    }
    body = BODY
    for name, value in values.items():
        body = body.replace(f"@{name}@", value)
    return "\n".join(header) + body


FREE_PORT = """$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"""


def _options(target: SlurmTarget, job: Job) -> list[str]:
    given = {
        "partition": target.partition,
        "account": target.account,
        "qos": target.qos,
        "constraint": target.constraint,
        "mem": target.memory,
        "gpus-per-node": target.gpus_per_node or None,
    }
    return [
        f"--job-name={job.base}",
        f"--nodes={target.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={target.cpus_per_node}",
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
        *(["--exclusive"] if target.exclusive else []),
        f"--time={target.time_limit}",
        f"--signal=B:USR1@{target.signal_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={target.working_dir}",
        f"--output={target.shared_dir}/logs/%x-%j.log",
        f"--export={','.join([*EXPORTED, *target.secrets])}",  # by name: no other secret of the submitter travels
    ]


def _secrets(target: SlurmTarget) -> list[str]:
    lines = []
    if target.secrets_file is not None:
        path = shlex.quote(target.secrets_file)
        lines += [
            f'case "$(stat -c %a {path})" in 600|400) ;; *) fail {path} must exist with mode 600 ;; esac',
            f"set -a; . {path}; set +a",
        ]
    lines += [f'test -n "${{{name}:-}}" || fail {name} is not set in the job' for name in target.secrets]
    return lines


def check_secrets(target: SlurmTarget, say: Say) -> None:
    """Check before the submission that the job will have its secrets.

    Raises:
        PreflightError: a variable is not set here, or others may read the secrets' file.
    """
    if target.secrets_file is None:
        if missing := [name for name in target.secrets if not os.environ.get(name)]:
            raise PreflightError(
                f"{', '.join(missing)}: not set here, from where the job takes it. Export it, or give a `secrets_file`."
            )
        return
    try:
        mode = stat.S_IMODE(os.stat(target.secrets_file).st_mode)
    except OSError as error:
        say(f"note: secrets_file {target.secrets_file} is not seen from here ({error.strerror}); the job checks it")
        return
    if mode not in (0o600, 0o400):
        raise PreflightError(f"secrets_file {target.secrets_file}: mode {mode:o}; run: chmod 600 {target.secrets_file}")


def _head(target: SlurmTarget) -> str:
    if target.nodes == 1:
        return "127.0.0.1"  # no other node has to reach it
    if target.interface is not None:
        return f"""$(ip -4 -o addr show dev {target.interface} | awk '{{split($4, a, "/"); print a[1]; exit}}')"""
    return "$(hostname -I | awk '{print $1}')"


class SlurmBackend:
    """Jobs of a Slurm cluster, through its own commands."""

    def __init__(self, target: SlurmTarget) -> None:
        self._target = target

    def preview(self, job: Job) -> Preview:
        """The batch script and the command that takes it."""
        script, command = render_script(self._target, job), self._command(job)
        text = f"# {shlex.join(command)} <<'SCRIPT'\n{script}"
        return Preview({"type": "slurm", "command": command, "script": script}, text)

    def _command(self, job: Job) -> list[str]:
        about = {name: job.metadata[name] for name in _SEEN}
        return ["sbatch", "--parsable", f"--comment={json.dumps(about, separators=(',', ':'))}"]

    def submit(self, job: Job, say: Say) -> str:
        """`sbatch`; the id is Slurm's."""
        check_secrets(self._target, say)
        refuse_if_alive(job, self.states())
        try:
            storage.make_directory(f"{self._target.shared_dir}/logs")
        except OSError as error:
            raise PreflightError(f"shared_dir {self._target.shared_dir} cannot be written here ({error})") from error
        answer = run_tool(self._command(job), hint=HINT, stdin=render_script(self._target, job))
        job_id = answer.strip().partition(";")[0]
        folder = self._folder(job_id)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        storage.write_json(str(folder / ABOUT), {"name": job.base, "metadata": job.metadata})
        say(f"{job_id}: submitted to Slurm as {job.base}; log: {self._log(job_id, job.base)}")
        return job_id

    def follow(self, job_id: str, write: Say, say: Say) -> int:
        """Write the log file until Slurm no longer lists the job (requeues included)."""
        shown, reason = 0, ""
        while True:
            state = retry_tool(lambda: self._state(job_id), job_id, say)
            text = self.logs(job_id)
            write(text[shown:])
            shown = max(shown, len(text))
            if not state.alive:
                code = {SUCCEEDED: 0, STOPPED: 130}.get(state.state, state.exit_code or FAILED_CODE)
                say(f"{job_id}: {state.state}, exit code {code}{f' ({state.message})' if state.message else ''}")
                return code
            if state.state == PENDING and state.message != reason:
                reason = state.message
                say(f"{job_id}: pending {reason}")
            time.sleep(POLL_SECONDS)

    def _state(self, job_id: str) -> JobState:
        for state in self.states():
            if state.id == job_id:
                return state
        return self._from_files(job_id)

    def states(self) -> list[JobState]:
        """States from our own files, over them accounting of the last 14 days (where it is on), over both the queue."""
        names = [path.parent.name for path in Path(self._target.shared_dir, "jobs").glob(f"*/{ABOUT}")]
        states = {name: self._from_files(name) for name in names if name.isdigit()}
        try:
            fields = "JobID,State,Start,End,ExitCode,JobName,Comment"
            rows = run_tool(["sacct", "-X", "-n", "-P", "--starttime=now-14days", f"--format={fields}"], hint=HINT)
            for line in rows.splitlines():
                number, state, start, end, code, name, comment = line.split("|", 6)
                if name.startswith("nvembed-"):
                    about = _about(comment) or (states[number].metadata if number in states else {})
                    kind, ended = self._ended(number, _kind(state.split()[0]), code)
                    states[number] = JobState(number, kind, state, _when(start), _when(end), ended, about)
        except PreflightError:
            pass  # accounting is off on many clusters
        rows = run_tool(["squeue", "--me", "--noheader", "--format=%i|%T|%S|%r|%j|%k"], hint=HINT)
        for line in rows.splitlines():
            number, kind, start, reason, name, comment = line.split("|", 5)
            if name.startswith("nvembed-"):
                about = _about(comment) or (states[number].metadata if number in states else {})
                states[number] = JobState(number, _kind(kind), f"({reason})", _when(start), metadata=about)
        return sorted(states.values(), key=lambda state: int(state.id.split("_")[0]))

    def _ended(self, job_id: str, kind: str, code: str) -> tuple[str, int | None]:
        """State and exit code of a row of accounting. The run's own code is in its file; Slurm's 0 does not count with
        TIMEOUT, OUT_OF_MEMORY or NODE_FAIL."""
        if kind in (PENDING, RUNNING):
            return kind, None
        known = self._exit_code(job_id)
        if known == 0:  # whatever happened to the job after its run
            return SUCCEEDED, 0
        if known is None:
            known = _accounted(code)
        return kind, None if kind != SUCCEEDED and known == 0 else known

    def _from_files(self, job_id: str) -> JobState:
        """State of a job that Slurm no longer lists, from its files on the shared storage."""
        folder, code = self._folder(job_id), self._exit_code(job_id)
        try:
            about = json.loads((folder / ABOUT).read_bytes())["metadata"]
        except (OSError, ValueError, KeyError, TypeError):
            about = {}
        state = {0: SUCCEEDED, INTERRUPTED: STOPPED}.get(FAILED_CODE if code is None else code, FAILED)
        if code is None and (folder / STOPPED_MARK).exists():
            state = STOPPED
        message = "" if code is not None else "ended without an exit code; Slurm no longer lists it"
        times = _changed(folder / RECIPE), _changed(folder / "exit_code")
        return JobState(job_id, state, message, *times, code, {str(key): str(value) for key, value in about.items()})

    def logs(self, job_id: str) -> str:
        """The log file on the shared storage."""
        paths = sorted(Path(self._target.shared_dir, "logs").glob(f"nvembed-*-{job_id}.log"))
        return paths[-1].read_text(encoding="utf-8", errors="replace") if paths else ""

    def stop(self, job_id: str) -> None:
        """`scancel`: the run stops, and nothing is requeued."""
        run_tool(["scancel", job_id], hint=HINT)
        if self._folder(job_id).is_dir():
            (self._folder(job_id) / STOPPED_MARK).touch()

    def _log(self, job_id: str, name: str) -> str:
        return f"{self._target.shared_dir}/logs/{name}-{job_id}.log"

    def _folder(self, job_id: str) -> Path:
        return Path(self._target.shared_dir, "jobs", job_id)

    def _exit_code(self, job_id: str) -> int | None:
        try:
            return int((self._folder(job_id) / "exit_code").read_text())
        except (OSError, ValueError):
            return None


def _kind(state: str) -> str:
    if state in _PENDING:
        return PENDING
    if state in _RUNNING:
        return RUNNING
    if state.startswith("CANCELLED"):
        return STOPPED
    return SUCCEEDED if state == "COMPLETED" else FAILED


def _accounted(code: str) -> int:
    """Accounting's `code:signal` as a shell's exit code; 0 where the signal is not one of the system (125: memory)."""
    number, _, signal = code.partition(":")
    if number != "0":
        return int(number)
    return 128 + int(signal) if signal.isdigit() and 0 < int(signal) < 65 else 0


def _changed(path: Path) -> str | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except OSError:
        return None


def _when(text: str) -> str | None:
    return text if text[:1].isdigit() else None


def _about(comment: str) -> dict[str, str]:
    try:
        values: Any = json.loads(comment)
    except ValueError:
        return {}
    return {str(name): str(value) for name, value in values.items()} if isinstance(values, dict) else {}
