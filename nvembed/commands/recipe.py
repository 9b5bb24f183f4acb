"""`nvembed recipe`: read, check and compare recipes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nvembed.commands.common import AsJson, RecipePath, Settings, ended, show
from nvembed.commands.complete import recipe_files
from nvembed.pipeline.exit_codes import ExitCode
from nvembed.recipe.diff import compare_recipes, difference_lines
from nvembed.recipe.document import dotted
from nvembed.recipe.schema import Recipe, RecipeError, load_recipe, resolved_yaml

app = typer.Typer(no_args_is_help=True, help="Read, check and compare recipes.")


@app.command("validate")
def validate_command(path: RecipePath, settings: Settings = None, as_json: AsJson = False) -> None:
    """Check a recipe and list every problem at once. Exit code 0 or 2."""

    def action() -> int:
        try:
            recipe = load_recipe(path, settings or [])
        except RecipeError as error:
            if not as_json:
                raise
            problems = [
                {
                    "path": dotted(problem.path),
                    "source": problem.position.source,
                    "line": problem.position.line,
                    "column": problem.position.column,
                    "message": problem.message,
                }
                for problem in error.problems
            ]
            show({"valid": False, "problems": problems}, "", True)
            return ExitCode.USAGE
        show({"valid": True, "name": recipe.name, "problems": []}, f"{path}: a valid recipe ({recipe.name})", as_json)
        return ExitCode.DONE

    raise ended(action)


@app.command("show")
def show_command(path: RecipePath, settings: Settings = None, as_json: AsJson = False) -> None:
    """Print a recipe with every default written out."""

    def action() -> int:
        recipe = load_recipe(path, settings or [])
        show(recipe.model_dump(mode="json"), resolved_yaml(recipe).rstrip("\n"), as_json)
        return ExitCode.DONE

    raise ended(action)


@app.command("schema")
def schema_command(as_json: AsJson = False) -> None:
    """Print the JSON schema of a recipe, for an editor's completion and checks.

    Write it to a file, and name the file in the first line of a recipe:
    # yaml-language-server: $schema=../recipe.schema.json
    """

    def action() -> int:
        schema = Recipe.model_json_schema()
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
        typer.echo(json.dumps(schema, indent=2, ensure_ascii=False))
        return ExitCode.DONE

    raise ended(action)


@app.command("diff")
def diff_command(
    first: Annotated[str, typer.Argument(metavar="A", help="Recipe.", autocompletion=recipe_files)],
    second: Annotated[str, typer.Argument(metavar="B", help="Recipe.", autocompletion=recipe_files)],
    as_json: AsJson = False,
) -> None:
    """Compare two recipes as they are resolved: order, comments and written-out defaults make no difference."""

    def action() -> int:
        differences = compare_recipes(load_recipe(first), load_recipe(second))
        show(differences, "\n".join(difference_lines(differences)) or "no difference", as_json)
        return ExitCode.DONE

    raise ended(action)
