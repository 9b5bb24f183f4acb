"""Running a pipeline on a recipe: checks, the lease of the output, the steps, and an orderly end in every case."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, overload

import psutil

from nvembed.core import storage
from nvembed.core.arguments import check_address, check_flag, check_list, public, shown
from nvembed.core.lease import Lease
from nvembed.core.terminal import Console
from nvembed.pipeline.attempts import Records
from nvembed.pipeline.declaration import Pipeline, load_pipeline
from nvembed.pipeline.dry_run import DryRun
from nvembed.pipeline.log import logged
from nvembed.pipeline.memory_meter import MemoryMeter
from nvembed.pipeline.output import check_output, claim_output
from nvembed.pipeline.run import PipelineRun
from nvembed.pipeline.signals import Interrupts, end_processes
from nvembed.pipeline.step_runner import StepRunner
from nvembed.preflight.findings import PreflightError
from nvembed.preflight.ready import check_reachable, check_ready, on_cluster
from nvembed.recipe.schema import Recipe, load_recipe, read_recipe
from nvembed.tracking.tracker import Tracker
from nvembed.types import UserError

PATIENCE_SECONDS = 3.0  # Ray's agents notice the end of the cluster by themselves


@dataclass(frozen=True)
class Request:
    """A pipeline, its checked recipe and its output, ready to run."""

    pipeline: Pipeline
    recipe: Recipe
    out: str


@overload
def run_pipeline(
    pipeline: Pipeline | str,
    recipe: str | None = None,
    *,
    settings: Sequence[str] = (),
    out: str | None = None,
    dry_run: Literal[False] = False,
    quiet: bool = False,
) -> PipelineRun: ...


@overload
def run_pipeline(
    pipeline: Pipeline | str,
    recipe: str | None = None,
    *,
    settings: Sequence[str] = (),
    out: str | None = None,
    dry_run: Literal[True],
    quiet: bool = False,
) -> DryRun: ...


@public
def run_pipeline(
    pipeline: Pipeline | str,
    recipe: str | None = None,
    *,
    settings: Sequence[str] = (),
    out: str | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> PipelineRun | DryRun:
    """Run a pipeline, as its command line does; steps that are published already are skipped.

    Args:
        pipeline: a `Pipeline`, or the path of a Python file that declares one.
        recipe: recipe, a YAML file, local or any URI; the pipeline's default recipe when None.
        settings: changes of the recipe, `"a.b=c"` each, the value in YAML.
        out: output directory or URI; `runs/<recipe name>` when None.
        dry_run: plan only, and touch nothing.
        quiet: write only warnings, errors and the last line to standard error.

    Returns:
        The finished `PipelineRun`: `artifacts` by step name, `out`, `report_path`. Of a dry run the `DryRun`, whose
        `steps` say what a run would do: `run`, `resume` or `skip`.

    Raises:
        UserError: an argument, the pipeline file, recipe, settings, data or output are wrong (exit code 2 of the
            command line).
        PreflightError: this machine or the cluster lacks something (3).
        StepFailedError: a step failed (4).
        PendingError: all steps ran but the registration, as the registry does not answer (4).
        KeyboardInterrupt: stopped; the same call resumes.

    Example:
        >>> from nvembed import run_pipeline
        >>> plan = run_pipeline(
        ...     "pipelines/quickstart.py", "pipelines/recipes/tiny.yaml", out="runs/example", dry_run=True
        ... )
        >>> [(step.name, step.what) for step in plan.steps[:3]]
        [('prepare', 'run'), ('initialise', 'run'), ('mine', 'run')]
    """
    check_flag("dry_run", dry_run)
    check_flag("quiet", quiet)
    recipe = None if recipe is None else check_address("recipe", recipe, "the path or URI of a YAML file")
    out = None if out is None else check_address("out", out, "the path or URI of a directory")
    settings = _checked_settings(settings)
    declared = pipeline if isinstance(pipeline, Pipeline) else load_pipeline(_pipeline_path(pipeline))
    if dry_run:
        return plan_run(declared, recipe, settings, out)
    console = Console(quiet=quiet)
    return execute(check_request(declared, recipe, settings, out, console), console, grace=None)


def _pipeline_path(pipeline: object) -> str:
    if callable(pipeline):
        name = getattr(pipeline, "__name__", type(pipeline).__name__)
        raise UserError(f"pipeline is the function {name}; give nvembed.pipeline.declaration.Pipeline({name}).")
    return check_address("pipeline", pipeline, "a Pipeline, or the path of a Python file that declares one")


def _checked_settings(settings: object) -> list[str]:
    """A list of `"a.b=c"`.

    Raises:
        UserError: anything else.
    """
    if isinstance(settings, Mapping):
        listed = [f"{key}={value}" for key, value in settings.items()]
        raise UserError(f"settings is {shown(settings)}, not a list; write {shown(listed)}.")
    checked = check_list("settings", settings, "settings")
    for index, setting in enumerate(checked):
        if not isinstance(setting, str):
            raise UserError(f'settings[{index}] is {shown(setting)}; write "section.key=value".')
    return checked


def check_request(
    pipeline: Pipeline, recipe: str | None, settings: Sequence[str], out: str | None, console: Console
) -> Request:
    """Check all that can be checked before anything is written; see `run_pipeline` for arguments and errors."""
    resolved = load_recipe(recipe or pipeline.recipe_path, settings, pipeline.needs)
    out = out or f"runs/{resolved.name}"
    check_reachable(out)
    out = storage.absolute(out)
    check_output(resolved, out, pipeline.name)
    if not on_cluster():  # a cluster is joined under the lease
        _check_ready(resolved, out, console)
    return Request(pipeline, resolved, out)


def plan_run(pipeline: Pipeline, recipe: str | None, settings: Sequence[str], out: str | None) -> DryRun:
    """The dry run; see `run_pipeline` for arguments and errors."""
    resolved, document = read_recipe(recipe or pipeline.recipe_path, settings, pipeline.needs)
    out = out or f"runs/{resolved.name}"
    unreachable = _why_unreachable(out)
    if not unreachable:
        out = storage.absolute(out)
        check_output(resolved, out, pipeline.name)
    run = DryRun(resolved, document, out, unreachable)
    pipeline.function(run)
    return run


def _why_unreachable(out: str) -> str | None:
    """Why the output cannot be read from here, which ends a run but not a dry run."""
    try:
        check_reachable(out)
    except PreflightError as error:
        return str(error)
    return None


def _check_ready(recipe: Recipe, out: str, console: Console) -> None:
    for note in check_ready(recipe, out):
        console.line(f"note: {note.check}: {note.message}{f'; {note.fix}' if note.fix else ''}")


def execute(request: Request, console: Console, *, grace: float | None) -> PipelineRun:
    """Run the steps of a request under the lease of its output.

    Args:
        request: what to run.
        console: takes the lines for the user.
        grace: seconds until a requested stop is forced, which ends the process; None never forces.

    Raises:
        KeyboardInterrupt: a stop was requested, whatever a library made of it.
    """
    recipe, out = request.recipe, request.out
    lease, meter = Lease(out), MemoryMeter()
    records: Records | None = None

    def on_force() -> None:
        if records is not None:
            records.close("interrupted", meter.peak_mb)
        lease.__exit__()

    with Interrupts(console.alert, on_force, grace=grace) as interrupts:
        try:
            with ExitStack() as stack:
                stack.enter_context(lease)
                stack.enter_context(ray_until_end())
                if on_cluster():  # before the recipe is stored: correcting a problem may change it
                    _check_ready(recipe, out, console)
                    interrupts.arm()  # joining a cluster replaced the handlers
                claim_output(recipe, out, request.pipeline.name)
                log = stack.enter_context(logged(console, out))
                stack.enter_context(meter)
                records = Records(out, lease.fence, request.pipeline.name)
                tracker = Tracker(recipe.tracking, out, recipe.model_dump(mode="json"), recipe.name)
                runner = StepRunner(recipe, out, lease.fence, meter, tracker, records, console, interrupts)
                console.line(f"{recipe.name} -> {out} (log: {log.removeprefix(out + '/')})")
                return _run_steps(request.pipeline, runner)
        except BaseException as error:
            if interrupts.requested or isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise


def _run_steps(pipeline: Pipeline, runner: StepRunner) -> PipelineRun:
    records, meter = runner.records, runner.meter
    run = PipelineRun(runner.recipe, runner.out, runner)
    try:
        pipeline.function(run)
        run.finish()
        status = "done"
    except BaseException:
        status = "interrupted" if runner.interrupts.requested else "failed"
        raise
    finally:
        records.close(status, meter.peak_mb)
        runner.tracker.close({"done": "finished"}.get(status, status))
    minutes, seconds = divmod(round(records.wall_seconds), 60)
    runner.console.alert(
        f"done in {minutes}:{seconds:02d}, {records.attempts} run(s), {records.peak_mb / 1024:.1f} GiB"
    )
    return run


@contextmanager
def ray_until_end() -> Iterator[None]:
    """End, on exit, the Ray cluster that was started meanwhile; no process of it is left then.

    A cluster that the caller had started stays, and so do the caller's own child processes.
    """
    before = set(psutil.Process().children(recursive=True))
    was_running = _ray_is_running()
    try:
        yield
    finally:
        if "ray" in sys.modules and not was_running:
            below = psutil.Process().children(recursive=True)  # after the shutdown they are no longer our children
            if _ray_is_running():
                sys.modules["ray"].shutdown()
            end_processes([process for process in below if process not in before], PATIENCE_SECONDS)


def _ray_is_running() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
