"""Shared by all commands: options, the exit code, the printed result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nvembed.commands.complete import recipe_files
from nvembed.core.secrets import mask
from nvembed.core.steps import MLFLOW_DB
from nvembed.core.terminal import Console
from nvembed.core.uris import sqlite_uri
from nvembed.pipeline.exit_codes import ExitCode, report_error
from nvembed.pipeline.signals import Interrupts
from nvembed.types import UserError

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a value of the recipe; repeatable.")
]
RecipePath = Annotated[
    str, typer.Argument(metavar="FILE", help="Recipe: a YAML file, local or any URI.", autocompletion=recipe_files)
]
Registry = Annotated[
    str | None, typer.Option(help="Registry URI; by default MLFLOW_TRACKING_URI, else the one below runs/.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


def ended(action: Callable[[], int], promise: str = "stopping") -> typer.Exit:
    """Run a command's body and return its exit; a user's mistake is written without a traceback.

    Args:
        action: the body; returns the exit code.
        promise: what Ctrl-C, which ends with 130, answers.
    """
    console = Console()
    try:
        with Interrupts(console.alert, lambda: None, promise=promise):
            return typer.Exit(action())
    except KeyboardInterrupt:
        return typer.Exit(ExitCode.INTERRUPTED)
    except Exception as error:
        return typer.Exit(report_error(error, console.alert))


def show(value: Any, text: str, as_json: bool) -> None:
    """Print a command's result on stdout: `value` as JSON, or `text`."""
    typer.echo(mask(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text))


def near_registry() -> str | None:
    """The registry of the one output below runs/, where neither --registry nor MLFLOW_TRACKING_URI names one."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    databases = sorted(Path("runs").glob(f"*/{MLFLOW_DB}"))
    if len(databases) > 1:
        listed = ", ".join(sqlite_uri(path) for path in databases)
        raise UserError(f"which registry? Give --registry with one of: {listed}")
    if not databases:
        return None
    typer.echo(f"registry: {databases[0]}", err=True)
    return sqlite_uri(databases[0])
