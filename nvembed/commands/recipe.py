"""`nvembed recipe`: read and check recipes."""

from __future__ import annotations

import typer

from nvembed.commands.common import RecipePath, Settings, ended
from nvembed.recipe import load_recipe, resolved_yaml
from nvembed.story import ExitCode

app = typer.Typer(no_args_is_help=True, help="Read and check recipes.")


@app.command("validate")
def validate_command(path: RecipePath, settings: Settings = None) -> None:
    """Check a recipe; everything wrong with it is told at once. Exit code 0 or 2."""

    def action() -> int:
        recipe = load_recipe(path, settings or [])
        typer.echo(f"{path}: a valid recipe ({recipe.name})")
        return ExitCode.DONE

    raise ended(action)


@app.command("show")
def show_command(path: RecipePath, settings: Settings = None) -> None:
    """Print a recipe with every default written out."""

    def action() -> int:
        typer.echo(resolved_yaml(load_recipe(path, settings or [])), nl=False)
        return ExitCode.DONE

    raise ended(action)
