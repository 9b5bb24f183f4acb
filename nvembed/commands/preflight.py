"""`nvembed preflight`: check this machine and the cluster against a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from nvembed.commands.common import AsJson, RecipePath, Settings, ended, show
from nvembed.pipeline.exit_codes import ExitCode


def preflight_command(
    path: RecipePath,
    settings: Settings = None,
    out: Annotated[str | None, typer.Option(help="Output directory or URI; runs/<recipe name> by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine and the cluster at RAY_ADDRESS against a recipe. Exit code 0, or 3 with every problem."""

    def action() -> int:
        from nvembed.core import storage
        from nvembed.pipeline.execution import ray_until_end
        from nvembed.preflight.findings import PROBLEM, as_text
        from nvembed.preflight.findings import as_json as plain
        from nvembed.preflight.ready import check_reachable, examine
        from nvembed.recipe.schema import load_recipe

        recipe = load_recipe(path, settings or [])
        place = out or f"runs/{recipe.name}"
        check_reachable(place)
        with ray_until_end():
            findings = examine(recipe, storage.absolute(place))
        show(plain(findings), as_text(findings), as_json)
        return ExitCode.PREFLIGHT if any(finding.state == PROBLEM for finding in findings) else ExitCode.DONE

    raise ended(action)
