"""The command line of a pipeline file.

    if __name__ == "__main__":
        raise SystemExit(main(PIPELINE))

Importing this loads nothing heavy; `main` loads the rest once Ctrl-C is handled.
"""

import inspect
from collections.abc import Sequence
from typing import Annotated

from nvembed.pipeline.declaration import Pipeline
from nvembed.pipeline.signals import GRACE_SECONDS, end_quietly_on_interrupt


def main(pipeline: Pipeline) -> int:
    """Run a pipeline with the arguments of this process.

    Returns:
        The exit code (`ExitCode`).
    """
    end_quietly_on_interrupt()
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command(help=inspect.getdoc(pipeline.function))
    def command(
        recipe: Annotated[str, typer.Argument(help="Recipe: a YAML file, local or any URI.")] = pipeline.recipe_path,
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
        changes = [*(settings or [])]
        if auto_promote is not None:
            changes.append(f"register.auto_promote={str(auto_promote).lower()}")
        if dry_run:
            raise typer.Exit(_print_plan(pipeline, recipe, changes, out, as_json))
        if as_json:
            raise typer.BadParameter("--json belongs to --dry-run; a run leaves report.json in its output")
        raise typer.Exit(_run(pipeline, recipe, changes, out, quiet))

    try:
        app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 2 if ended.code else 0
    return 0


def _run(pipeline: Pipeline, recipe: str, settings: Sequence[str], out: str | None, quiet: bool) -> int:
    from nvembed.core.terminal import Console
    from nvembed.pipeline.execution import check_request, execute
    from nvembed.pipeline.exit_codes import ExitCode, report_error

    console, output = Console(quiet=quiet), None
    try:
        request = check_request(pipeline, recipe, settings, out, console)
        output = request.out
        execute(request, console, grace=GRACE_SECONDS)
    except KeyboardInterrupt:
        console.alert("interrupted; run the same command again to resume")
        return ExitCode.INTERRUPTED
    except Exception as error:
        return report_error(error, console.alert, output)
    return ExitCode.DONE


def _print_plan(pipeline: Pipeline, recipe: str, settings: Sequence[str], out: str | None, as_json: bool) -> int:
    import json

    from nvembed.core.terminal import Console
    from nvembed.pipeline.execution import plan_run
    from nvembed.pipeline.exit_codes import ExitCode, report_error
    from nvembed.plan import dry_run

    try:
        run = plan_run(pipeline, recipe, settings, out)
    except Exception as error:
        return report_error(error, Console().alert)
    if as_json:
        print(json.dumps(dry_run.as_json(run.recipe, run.document, run), indent=2, ensure_ascii=False))
    else:
        print(dry_run.as_text(run.recipe, run.document, run))
    return ExitCode.DONE
