"""What every story needs: arguments, lease, one recipe per output, a clean end, exit codes (layer 6).

    raise SystemExit(tell(quickstart, default="quickstart.yaml", needs=("stage_1",)))

The story itself is a function of a `Road`, in `pipelines/`.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml
from pydantic import ValidationError

from nvembed.core import storage
from nvembed.core.lease import LEASE, Lease
from nvembed.core.secrets import mask
from nvembed.core.steps import (
    RECIPE,
    RECORDS,
    REPORT_HTML,
    REPORT_JSON,
    ChangedRecipeError,
    CorruptArtifactError,
    differences,
)
from nvembed.core.terminal import Console
from nvembed.pipeline.attempts import Records
from nvembed.pipeline.dry_run import PlannedRoad
from nvembed.pipeline.log import logged
from nvembed.pipeline.memory_meter import MemoryMeter
from nvembed.pipeline.run import PendingError, Road
from nvembed.pipeline.signals import Interrupts, end_processes
from nvembed.preflight.packages import PreflightError
from nvembed.preflight.ready import check_reachable, check_ready, on_cluster
from nvembed.recipe.schema import Recipe, load_recipe, read_recipe, resolved_yaml
from nvembed.tracking.tracker import STATE, Tracker
from nvembed.types import UserError

__all__ = ["ExitCode", "PlannedRoad", "Road", "tell"]

PATIENCE_SECONDS = 3.0  # Ray's agents notice the end of the cluster by themselves
FREE_SECTIONS = ("cluster", "tracking")  # say where a run computes and who is told, never what comes out
# names a run writes at the root of its output: a directory that has one of them but no recipe.yaml is not ours
ROOT_NAMES = (RECORDS, STATE, REPORT_JSON, REPORT_HTML, "mlflow.db", "mlartifacts", "logs")

Story = Callable[[Any], None]


class ExitCode(enum.IntEnum):
    """How a command of nvembed ends."""

    DONE = 0
    USAGE = 2  # arguments, recipe, data or a damaged artifact: the user can mend it
    PREFLIGHT = 3
    FAILED = 4
    GATE = 5
    INTERRUPTED = 130


class GatePreconditionError(RuntimeError):
    """A gate refused: what it asks for is not given. Exit code 5."""


def tell(story: Story, *, default: str, needs: Sequence[str] = ()) -> int:
    """Run a story from the command line.

    Args:
        story: function of a road; its docstring is the help text.
        default: recipe beside the story, in `recipes/`.
        needs: sections of the recipe that the story reads and that are optional elsewhere.

    Returns:
        The exit code.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    default_path = Path(inspect.getfile(story)).resolve().parent / "recipes" / default

    @app.command(help=inspect.getdoc(story))
    def command(
        recipe: Annotated[str, typer.Argument(help="Recipe: a YAML file, local or any URI.")] = str(default_path),
        settings: Annotated[
            list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a value of the recipe; repeatable.")
        ] = None,
        out: Annotated[str | None, typer.Option(help="Output directory or URI; runs/<recipe name> by default.")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and touch nothing.")] = False,
        auto_promote: Annotated[
            bool | None, typer.Option("--auto-promote/--no-auto-promote", help="Overrides register.auto_promote.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: the plan machine-readable.")] = False,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings, errors and the last line.")] = False,
    ) -> None:
        given = [*(settings or [])]
        if auto_promote is not None:
            given.append(f"register.auto_promote={str(auto_promote).lower()}")
        console = Console(quiet=quiet)
        if dry_run:
            raise typer.Exit(_look(story, recipe, given, out, needs, as_json, console))
        if as_json:
            raise typer.BadParameter("--json belongs to --dry-run; a run leaves report.json in its output")
        raise typer.Exit(_tell(story, recipe, given, out, needs, console))

    try:
        app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ExitCode.USAGE if ended.code else ExitCode.DONE)
    return int(ExitCode.DONE)


def _tell(
    story: Story, path: str, settings: Sequence[str], out: str | None, needs: Sequence[str], console: Console
) -> int:
    try:
        recipe = load_recipe(path, settings, needs)
        out = out or f"runs/{recipe.name}"
        check_reachable(out)
        out = storage.absolute(out)
        _refuse_other_output(recipe, out)
        if not on_cluster():  # before anything is written; a cluster is joined under the lease
            _check_ready(recipe, out, console)
    except (UserError, ValidationError, PreflightError) as error:
        return report_error(error, console.alert)
    return _run(story, recipe, out, console)


def _look(
    story: Story,
    path: str,
    settings: Sequence[str],
    out: str | None,
    needs: Sequence[str],
    as_json: bool,
    console: Console,
) -> int:
    """The dry run: say what a run would do, and touch nothing."""
    from nvembed.plan import dry_run

    try:
        recipe, document = read_recipe(path, settings, needs)
        out = out or f"runs/{recipe.name}"
        unreachable = _why_unreachable(out)
        if not unreachable:
            out = storage.absolute(out)
            _refuse_other_output(recipe, out)
        road = PlannedRoad(recipe, out, unreachable)
        story(road)
    except (UserError, ValidationError) as error:
        return report_error(error, console.alert)
    if as_json:
        print(json.dumps(dry_run.as_json(recipe, document, road), indent=2, ensure_ascii=False))
    else:
        print(dry_run.as_text(recipe, document, road))
    return ExitCode.DONE


def _why_unreachable(out: str) -> str | None:
    """Why the output cannot be looked at from here, which ends a run but not a dry run."""
    try:
        check_reachable(out)
    except PreflightError as error:
        return str(error)
    return None


def _check_ready(recipe: Recipe, out: str, console: Console) -> None:
    for note in check_ready(recipe, out):
        console.line(f"note: {note.check}: {note.said}{f'; {note.fix}' if note.fix else ''}")


def _run(story: Story, recipe: Recipe, out: str, console: Console) -> int:
    """Hold the output, walk the story, and leave everything tidy however it ends."""
    lease = Lease(out)
    records: Records | None = None
    meter = MemoryMeter()

    def on_force() -> None:
        if records is not None:
            records.close("interrupted", meter.peak_mb)
        lease.__exit__()

    with Interrupts(console.alert, on_force) as interrupts:
        try:
            with ExitStack() as stack:
                stack.enter_context(lease)
                stack.callback(shut_down_ray)
                if on_cluster():  # before the recipe is stored: what mends a problem may be a change of it
                    _check_ready(recipe, out, console)
                    interrupts.arm()  # joining a cluster replaced the handlers
                _claim(recipe, out)
                log = stack.enter_context(logged(console, out))
                stack.enter_context(meter)
                records = Records(out, lease.fence)
                tracker = Tracker(recipe.tracking, out, recipe.model_dump(mode="json"), recipe.name)
                try:
                    console.line(f"{recipe.name} -> {out} (log: {log.removeprefix(out + '/')})")
                    road = Road(recipe, out, lease.fence, meter, tracker, records, console, interrupts)
                    story(road)
                    road.finish()
                    status = "done"
                except BaseException:
                    status = "interrupted" if interrupts.asked else "failed"
                    raise
                finally:
                    records.close(status, meter.peak_mb)
                    tracker.close({"done": "finished"}.get(status, status))
                minutes, seconds = divmod(round(records.wall_seconds), 60)
                console.alert(
                    f"done in {minutes}:{seconds:02d}, {records.attempts} run(s), {records.peak_mb / 1024:.1f} GiB"
                )
                return ExitCode.DONE
        except BaseException as error:
            if interrupts.asked or isinstance(
                error, KeyboardInterrupt
            ):  # whatever a library made of it: SystemExit, an error of its own
                console.alert("interrupted; run the same command again to go on")
                return ExitCode.INTERRUPTED
            if not isinstance(error, Exception):
                raise
            return report_error(error, console.alert, out)


def report_error(error: BaseException, say: Callable[[str], None], out: str | None = None) -> int:
    """Say what went wrong and give the exit code; the traceback of what is no user's mistake goes to a file."""
    if isinstance(error, UserError | ValidationError):
        say(f"error: {error}")
        return ExitCode.USAGE
    if isinstance(error, PreflightError):
        say(f"error: {error}")
        return ExitCode.PREFLIGHT
    if isinstance(error, GatePreconditionError):
        say(f"refused: {error}")
        return ExitCode.GATE
    if isinstance(error, PendingError):
        say(f"error: {error}")
        return ExitCode.FAILED
    text = mask("".join(traceback.format_exception(error)))
    say(f"error: {_first_line(error)[:1000]}")
    if out is None:
        say(text)
        return ExitCode.FAILED
    path = storage.join(out, "logs", f"error-{time.strftime('%Y%m%d-%H%M%S')}.log")
    try:
        storage.write_bytes(path, text.encode("utf-8", "replace"))
        say(f"the full error is in {path}")
    except OSError:  # the disk is full or gone, perhaps that is the error
        say(text)
    return ExitCode.FAILED


_CAUSE = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)(?:: .*)?$", re.MULTILINE)


def _first_line(error: BaseException) -> str:
    """What an error says first. One that comes out of Ray holds the remote traceback: there, what was raised first."""
    text = str(error)
    cause = _CAUSE.search(text) if type(error).__module__.partition(".")[0] == "ray" else None
    if cause is not None:
        return cause.group()
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__)


def _refuse_other_output(recipe: Recipe, out: str) -> None:
    """Refuse an output that belongs to another recipe, or to somebody else."""
    path = storage.join(out, RECIPE)
    if not storage.exists(path):
        names = set(storage.list_directory(out))
        foreign = sorted(names & set(ROOT_NAMES))
        if foreign and LEASE not in names:
            raise UserError(f"{out} holds {', '.join(foreign)} that no run made. Choose another --out.")
        return
    changes = differences(_deciding(_stored_recipe(path)), _deciding(recipe.model_dump(mode="json")))
    if changes:
        listed = "\n  ".join(changes)
        raise ChangedRecipeError(
            f"{out} was made with another recipe ({path}):\n  {listed}\n"
            "Use another --out, or go back to the recipe it was made with."
        )


def _stored_recipe(path: str) -> dict[str, Any]:
    """The stored recipe with today's defaults filled in; as it stands where this version does not take it."""
    try:
        return load_recipe(path).model_dump(mode="json")
    except UserError:
        try:
            found = yaml.safe_load(storage.read_bytes(path))
        except (yaml.YAMLError, ValueError) as error:
            raise CorruptArtifactError(f"{path} cannot be read ({error}). Move {path} away.") from error
        return found if isinstance(found, dict) else {"recipe": found}


def _deciding(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in FREE_SECTIONS}


def _claim(recipe: Recipe, out: str) -> None:
    """Write the resolved recipe, once; look again first, as another run may have been faster."""
    _refuse_other_output(recipe, out)
    path = storage.join(out, RECIPE)
    if not storage.exists(path):
        storage.write_bytes(path, resolved_yaml(recipe).encode())


def shut_down_ray() -> None:
    """End the Ray cluster this process started, if it did; nothing of it is left when this returns."""
    ray = sys.modules.get("ray")
    if ray is None:
        return
    below = psutil.Process().children(recursive=True)  # after the shutdown they are nobody's children
    if ray.is_initialized():
        ray.shutdown()
    end_processes(below, PATIENCE_SECONDS)
