"""`nvembed jobs`: list, status, logs and stop of submitted jobs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nvembed.commands.common import AsJson, ended, show
from nvembed.core.terminal import Console
from nvembed.pipeline.exit_codes import ExitCode

if TYPE_CHECKING:
    from nvembed.jobs.backend import Backend, JobState, Say

app = typer.Typer(no_args_is_help=True, help="Submitted jobs: list, status, logs, stop.")
TargetPath = Annotated[str, typer.Argument(metavar="TARGET", help="A file of cluster/: where the job runs.")]
JobId = Annotated[str | None, typer.Argument(metavar="[ID]", help="The job; the newest one by default.")]


def _backend(target: str) -> Backend:
    from nvembed.jobs.submit import open_backend
    from nvembed.jobs.target import load_target

    return open_backend(load_target(target))


def follow(backend: Backend, target: str, job_id: str, say: Say, *, quiet: bool = False) -> int:
    """Write a job's log until it ends; Ctrl-C detaches, and the job continues."""

    def write(text: str) -> None:
        (sys.stderr if quiet else sys.stdout).write(text)
        (sys.stderr if quiet else sys.stdout).flush()

    try:
        return backend.follow(job_id, write, say)
    except KeyboardInterrupt:
        say(
            f"detached; {job_id} continues.\n  follow it: nvembed jobs logs {target} {job_id} --follow\n"
            f"  stop it:   nvembed jobs stop {target} {job_id}"
        )
        return ExitCode.INTERRUPTED


@app.command("list")
def list_command(target: TargetPath, as_json: AsJson = False) -> None:
    """Jobs of nvembed on a target, oldest first."""

    def action() -> int:
        states = _backend(target).states()
        lines = [_line(state) for state in states] or ["no job of nvembed here"]
        show([state.as_json() for state in states], "\n".join(lines), as_json)
        return ExitCode.DONE

    raise ended(action)


@app.command("status")
def status_command(target: TargetPath, job_id: JobId = None, as_json: AsJson = False) -> None:
    """One job: its state, exit code, times, recipe and revision."""

    def action() -> int:
        from nvembed.jobs.backend import choose

        state = choose(_backend(target).states(), job_id, alive=False)
        details = [f"  {name}: {value}" for name, value in sorted(state.metadata.items())]
        message = [f"  {state.message.splitlines()[0]}"] if state.message else []
        show(state.as_json(), "\n".join([_line(state), *message, *details]), as_json)
        return ExitCode.DONE

    raise ended(action)


@app.command("logs")
def logs_command(
    target: TargetPath,
    job_id: JobId = None,
    follow_it: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the job ends; the exit code is the job's.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the log of a job."""

    def action() -> int:
        from nvembed.jobs.backend import choose

        backend = _backend(target)
        chosen = choose(backend.states(), job_id, alive=False).id
        if follow_it and not as_json:
            return follow(backend, target, chosen, Console().line)
        text = backend.logs(chosen)
        show({"id": chosen, "logs": text}, text.rstrip("\n"), as_json)
        return ExitCode.DONE

    raise ended(action, "detaching from the job, which continues" if follow_it else "stopping")


@app.command("stop")
def stop_command(
    target: TargetPath,
    job_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="By default the only one alive.")] = None,
    as_json: AsJson = False,
) -> None:
    """Stop a job; what it saved stays, and submitting it again resumes it."""

    def action() -> int:
        from nvembed.jobs.backend import choose

        backend = _backend(target)
        state = choose(backend.states(), job_id, alive=job_id is None)
        if state.alive:
            backend.stop(state.id)
        answer = "asked to stop" if state.alive else f"has ended already ({state.state})"
        show({"id": state.id, "asked": state.alive, "state": state.state}, f"{state.id}: {answer}", as_json)
        return ExitCode.DONE

    raise ended(action)


def _line(state: JobState) -> str:
    code = "" if state.exit_code is None else f" (exit code {state.exit_code})"
    return f"{state.id}  {state.state}{code}  {state.started or '-'}"
