"""The `nvembed` command (layer 6): embed, recipe, doctor. Nothing heavy is imported before it is needed.

nvembed embed models:/nvembed-quickstart-teacher@champion texts.txt --out vectors.parquet --instruction web_search
nvembed recipe validate pipelines/recipes/quickstart.yaml
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from nvembed.interrupt import Interrupts
from nvembed.progress import Console
from nvembed.recipe import load_recipe, resolved_yaml
from nvembed.storage import UserError
from nvembed.story import ExitCode, report_error

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Embedding models: use and check them.",
)
recipes = typer.Typer(no_args_is_help=True, help="Read and check recipes.")
app.add_typer(recipes, name="recipe")

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a value of the recipe; repeatable.")
]
RecipePath = Annotated[str, typer.Argument(metavar="FILE", help="Recipe: a YAML file, local or any URI.")]


def main() -> None:
    """Entry point of the `nvembed` command."""
    app()


def _ended(action: Callable[[], int]) -> typer.Exit:
    """Run a command's body; users' mistakes are told without a traceback, Ctrl-C ends with 130."""
    console = Console()
    try:
        with Interrupts(console.line, lambda: None, promise="stopping"):
            return typer.Exit(action())
    except KeyboardInterrupt:
        return typer.Exit(ExitCode.INTERRUPTED)
    except Exception as error:
        return typer.Exit(report_error(error, console.line))


@app.command("embed")
def embed_command(
    model: Annotated[str, typer.Argument(help="Model folder, or models:/name@alias of the registry.")],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="txt (a text per line), jsonl or parquet.")],
    out: Annotated[str, typer.Option(help="parquet (id, vector) or npy (vectors in the input's order).")],
    instruction: Annotated[
        str | None, typer.Option(help="Task for queries: a sentence, or a key of the catalogue. Documents need none.")
    ] = None,
    prompt_name: Annotated[str | None, typer.Option(help="A prompt stored in the model folder, instead.")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Matryoshka prefix; the full width by default.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=8, help="Tokens of one forward, padding included.")] = 4096,
    text_column: Annotated[str, typer.Option(help="Where the text is, in jsonl and parquet.")] = "text",
    title_column: Annotated[str | None, typer.Option(help="Title put before the text.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto (bf16 where the processor has it).")] = "fp32",
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads.")] = None,
    registry: Annotated[
        str | None, typer.Option(help="Registry URI; by default MLFLOW_TRACKING_URI, else the one below runs/.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
) -> None:
    """Embed a file of texts."""

    def action() -> int:
        from nvembed.embed_file import EmbedJob, prompt_prefix, write_vectors
        from nvembed.registry import resolve_model
        from nvembed.text.instructions import instruction_prefix

        if instruction is not None and prompt_name is not None:
            raise UserError("give --instruction or --prompt-name, not both")
        if precision not in ("fp32", "bf16", "auto"):
            raise UserError(f"--precision {precision}: choose fp32, bf16 or auto")
        folder = resolve_model(model, registry or (_near_registry() if model.startswith("models:/") else None))
        prefix = instruction_prefix(instruction) if instruction is not None else ""
        if prompt_name is not None:
            prefix = prompt_prefix(folder, prompt_name)
        job = EmbedJob(
            folder, source, out, prefix, dim, batch_tokens, text_column, title_column, precision, threads, force
        )
        rows, width = write_vectors(job, Console().line)
        typer.echo(f"{out}: {rows:,} vectors of {width} numbers")
        return ExitCode.DONE

    raise _ended(action)


def _near_registry() -> str | None:
    """The registry of the one output below runs/, where neither --registry nor MLFLOW_TRACKING_URI names one."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    found = sorted(Path("runs").glob("*/mlflow.db"))
    if len(found) > 1:
        listed = ", ".join(f"sqlite:///{path.absolute()}" for path in found)
        raise UserError(f"which registry? Give --registry with one of: {listed}")
    if not found:
        return None
    typer.echo(f"registry: {found[0]}", err=True)
    return f"sqlite:///{found[0].absolute()}"


@recipes.command("validate")
def validate_command(path: RecipePath, settings: Settings = None) -> None:
    """Check a recipe; everything wrong with it is told at once. Exit code 0 or 2."""

    def action() -> int:
        recipe = load_recipe(path, settings or [])
        typer.echo(f"{path}: a valid recipe ({recipe.name})")
        return ExitCode.DONE

    raise _ended(action)


@recipes.command("show")
def show_command(path: RecipePath, settings: Settings = None) -> None:
    """Print a recipe with every default written out."""

    def action() -> int:
        typer.echo(resolved_yaml(load_recipe(path, settings or [])), nl=False)
        return ExitCode.DONE

    raise _ended(action)


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Look at this machine: versions, packages, processor, memory, Ray. Exit code 0, or 3 when something is wrong."""

    def action() -> int:
        from nvembed import doctor as checks

        findings = checks.examine()
        typer.echo(json.dumps(checks.as_json(findings), indent=2) if as_json else checks.as_text(findings))
        return ExitCode.PREFLIGHT if any(finding.state == checks.PROBLEM for finding in findings) else ExitCode.DONE

    raise _ended(action)


if __name__ == "__main__":
    main()
