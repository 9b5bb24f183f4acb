"""`type: ray`: an existing cluster, through Ray's Jobs API.

The address, the token and the certificate are checked before anything is sent. The driver runs on the head node with
0 GPUs; Ray's job supervisor gives it `RAY_ADDRESS`, so the run joins the cluster.
"""

from __future__ import annotations

import logging
import os
import shlex
import ssl
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nvembed.core.secrets import MASK
from nvembed.jobs.backend import (
    FAILED,
    PENDING,
    RUNNING,
    STOPPED,
    SUCCEEDED,
    JobState,
    Preview,
    Say,
    as_yaml,
    next_try,
    refuse_if_alive,
    without_log,
)
from nvembed.jobs.command import Job
from nvembed.jobs.config import RayTarget
from nvembed.jobs.ray.log import follow_log
from nvembed.jobs.uploads import WorkingDir, collect
from nvembed.preflight.findings import PreflightError
from nvembed.types import UserError

STATES = {"PENDING": PENDING, "RUNNING": RUNNING, "SUCCEEDED": SUCCEEDED, "FAILED": FAILED, "STOPPED": STOPPED}
OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's client prefers these to the address it is given
TOKEN_FILE = ".ray/auth_token"
REQUEST_SECONDS = 60.0


class SilentError(PreflightError):
    """No server answers at the address."""


def render_request(target: RayTarget, job: Job, submission_id: str, working_dir: str) -> dict[str, Any]:
    """The arguments of `JobSubmissionClient.submit_job`. Pure."""
    entry = target.entrypoint
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(target.stop_wait_seconds), **target.env_vars}
    request: dict[str, Any] = {
        "submission_id": submission_id,
        "entrypoint": render_entrypoint(target, job),
        "runtime_env": {"working_dir": working_dir, "env_vars": environment},
        "metadata": job.metadata,
    }
    wanted = {
        "entrypoint_num_cpus": entry.num_cpus,
        "entrypoint_num_gpus": entry.num_gpus,
        "entrypoint_memory": entry.memory_mb * 2**20,
        "entrypoint_resources": entry.resources,
        "entrypoint_label_selector": entry.label_selector,
    }
    return request | {name: value for name, value in wanted.items() if value}


def render_entrypoint(target: RayTarget, job: Job) -> str:
    """The shell command of the driver; before it, a check that the node has the target's secrets."""
    command = shlex.join(job.argv)
    checks = [
        f'test -n "${{{name}:-}}" || {{ echo "error: {name} is not set where the driver runs: set it for `ray start` '
        f'(or in the pod)"; exit 3; }}'
        for name in target.secrets
    ]
    return "; ".join([*checks, f"exec {command}"])


class RayBackend:
    """Jobs of a Ray cluster."""

    def __init__(self, target: RayTarget) -> None:
        self._target = target
        self._opened: Any = None

    def preview(self, job: Job) -> Preview:
        """The job as it would be submitted; its number is 1, as only the cluster knows the next one."""
        travels = self._collect(job)
        request = render_request(self._target, job, f"{job.base}-1", str(travels.folder))
        headers = {name: f"{MASK} (from {variable})" for name, variable in self._target.headers.items()}
        if self._target.authentication == "token":
            headers["Authorization"] = f"Bearer {MASK}"
        value = {
            "type": "ray",
            "address": self._target.address,
            "headers": headers,
            "request": request,
            "working_dir": {
                "files": len(travels.files),
                "megabytes": round(travels.megabytes, 3),
                "biggest": [{"file": name, "bytes": size} for name, size in travels.biggest],
            },
        }
        note = "# the number at the end of submission_id becomes the next free one\n"
        return Preview(value, note + as_yaml(value))

    def submit(self, job: Job, say: Say) -> str:
        """Send the code and start the job."""
        travels = self._collect(job)
        states = self.states()
        refuse_if_alive(job, states)
        submission_id = next_try(job.base, states)
        client = self._client()
        with tempfile.TemporaryDirectory(prefix="nvembed-submit-") as folder:
            travels.stage(Path(folder))
            request = render_request(self._target, job, submission_id, folder)
            with _environment({"RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "1"}), self._translated_errors():
                # the staged files are uploaded as they are: Ray must not filter them again
                submitted = str(client.submit_job(**request))
        say(f"{submitted}: submitted to {self._target.address}, {len(travels.files)} files, {travels.megabytes:.1f} MB")
        return submitted

    def follow(self, job_id: str, write: Say, say: Say) -> int:
        """The log until the end; survives lost connections."""
        with self._translated_errors():
            details = follow_log(self._client(), job_id, write, say, self._target.reconnect_seconds)
        state = _state(details)
        code = exit_code(state)
        why = f" ({state.message})" if state.state == FAILED and state.message else ""
        say(f"{job_id}: {state.state}, exit code {code}{why}")
        return code

    def states(self) -> list[JobState]:
        """Jobs that `nvembed submit` made, oldest first."""
        with self._translated_errors():
            jobs = self._client().list_jobs()
        ours = [details for details in jobs if "nvembed_fingerprint" in (details.metadata or {})]
        return [_state(details) for details in sorted(ours, key=lambda details: details.start_time or 0)]

    def alive(self) -> list[str]:
        """Ids of all jobs that wait or run there, also those that `nvembed submit` did not make."""
        with self._translated_errors():
            jobs = self._client().list_jobs()
        return sorted(
            str(details.submission_id or details.job_id) for details in jobs if not details.status.is_terminal()
        )

    def logs(self, job_id: str) -> str:
        """The driver's output so far."""
        with self._translated_errors():
            return str(self._client().get_job_logs(job_id))

    def stop(self, job_id: str) -> None:
        """SIGTERM for the driver, SIGKILL after `stop_wait_seconds`."""
        with self._translated_errors():
            self._client().stop_job(job_id)

    # -- connection ---------------------------------------------------------------------------------------------------

    def _collect(self, job: Job) -> WorkingDir:
        travels = collect(job.folder, self._target.excludes, self._target.max_megabytes)
        for what, name in (("pipeline", job.script), ("recipe", job.recipe_path)):
            if name and "://" not in name and os.path.normpath(name) not in travels.files:
                raise UserError(
                    f"{what} {name}: is not uploaded with the job (outside {travels.folder}, ignored by git, or in "
                    "`excludes`). Give a path inside the working directory, or a URI."
                )
        return travels

    def _client(self) -> Any:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Any:
        target = self._target
        headers = {name: _value_of(variable) for name, variable in target.headers.items()}
        if target.authentication == "token":
            taken = any(name.lower() == "authorization" for name in headers)
            headers["X-Ray-Authorization" if taken else "Authorization"] = f"Bearer {read_token()}"
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they log every socket and package

        class Client(JobSubmissionClient):
            """Ray's client with a timeout on its requests."""

            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                return super()._do_request(method, endpoint, **{"timeout": REQUEST_SECONDS, **options})

        with _environment(dict.fromkeys(OVERRIDES)), self._translated_errors():
            client = Client(target.address, headers=headers, verify=_authorities(target))
            if target.authentication == "token" and not target.headers:
                self._refuse_open_cluster()
        return client

    def _refuse_open_cluster(self) -> None:
        """Refuse a cluster that answers without a token: anyone can run code there."""
        import requests

        url = f"{self._target.address.rstrip('/')}/api/jobs/"
        answer = requests.get(url, timeout=REQUEST_SECONDS, verify=_authorities(self._target))
        if answer.status_code == 200:
            raise PreflightError(
                f"{self._target.address} answers without a token: anyone who reaches it can run code there. Start the "
                "cluster with RAY_AUTH_MODE=token (or, on this machine only, set authentication: disabled)."
            )

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Errors of Ray's client as PreflightError with the cause and the fix."""
        import requests
        from ray.exceptions import AuthenticationError

        address = self._target.address
        try:
            yield
        except AuthenticationError as error:
            raise PreflightError(
                f"{address} refused the token ({str(error).splitlines()[0]}). RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH "
                "must hold the token that the cluster was started with."
            ) from error
        except FileNotFoundError as error:
            raise PreflightError(f"{address}: the certificate cannot be checked ({error}). See `verify`.") from error
        except (ConnectionError, ssl.SSLError, requests.exceptions.RequestException) as error:
            if why := _certificate(error):
                raise PreflightError(
                    f"{address}: no TLS with it ({why}), so neither token nor code was sent. If the address is "
                    "right, set `verify` to the file of the authority that signed its certificate."
                ) from error
            raise SilentError(
                f"{address} cannot be reached ({str(error).splitlines()[0]}). Is the cluster up, its dashboard "
                "started, the tunnel open?"
            ) from error
        except RuntimeError as error:
            if "Request failed with status code" in str(error):
                raise PreflightError(f"{address}: {str(error)[:1000]}") from error
            raise


def _authorities(target: RayTarget) -> bool | str:
    """Certificate authorities: those of the environment, as requests takes them, made explicit for the websocket."""
    if target.verify is not True:
        return target.verify
    return os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True


def _certificate(error: BaseException | None) -> str:
    """OpenSSL's message about the server's certificate, from the chain of causes; "" for other errors."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"certificate verify failed: {getattr(error, 'verify_message', '') or error}"
        if isinstance(error, ssl.SSLError):
            return str(error.reason or error)
        reason = error.args[0] if error.args else None
        inner = getattr(reason, "reason", None)  # urllib3's MaxRetryError inside the one of requests
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__
    return ""


def read_token(environment: Mapping[str, str] | None = None) -> str:
    """The token for the cluster, from Ray's own places: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    Raises:
        PreflightError: there is none.
    """
    environment = os.environ if environment is None else environment
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / TOKEN_FILE
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if named:
            raise PreflightError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be read ({error})") from error
        token = ""
    if not token:
        raise PreflightError(
            "no token for the cluster: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that has it"
        )
    return token


def exit_code(state: JobState) -> int:
    """The code `submit` ends with: the driver's own; 130 for a stopped job, 4 where the driver's is not known."""
    if state.state == SUCCEEDED:
        return 0
    if state.state == STOPPED:
        return 130
    if not state.exit_code:
        return 4
    return 128 - state.exit_code if state.exit_code < 0 else state.exit_code


def _state(details: Any) -> JobState:
    return JobState(
        id=details.submission_id,
        state=STATES[str(details.status.value)],
        message=without_log(details.message),
        started=_time(details.start_time),
        ended=_time(details.end_time),
        exit_code=details.driver_exit_code,
        metadata=details.metadata or {},
    )


def _time(milliseconds: int | None) -> str | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds") if milliseconds else None


def _value_of(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise PreflightError(f"{variable} is not set; the target's `headers` take a value from it")
    return value


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables for the block; None removes one."""
    before = {name: os.environ.get(name) for name in changes}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)
