"""What every command shares: its options, how it ends, how its result is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from nvembed.interrupt import Interrupts
from nvembed.progress import Console
from nvembed.secrets import mask
from nvembed.story import ExitCode, report_error

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a value of the recipe; repeatable.")
]
RecipePath = Annotated[str, typer.Argument(metavar="FILE", help="Recipe: a YAML file, local or any URI.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


def ended(action: Callable[[], int]) -> typer.Exit:
    """Run a command's body; users' mistakes are told without a traceback, Ctrl-C ends with 130."""
    console = Console()
    try:
        with Interrupts(console.line, lambda: None, promise="stopping"):
            return typer.Exit(action())
    except KeyboardInterrupt:
        return typer.Exit(ExitCode.INTERRUPTED)
    except Exception as error:
        return typer.Exit(report_error(error, console.line))


def show(value: Any, text: str, as_json: bool) -> None:
    """Print a command's result on stdout: `value` as JSON, or `text`."""
    typer.echo(mask(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text))
