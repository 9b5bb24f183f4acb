"""`nvembed plan`: what a recipe costs on a machine, before anything runs."""

from __future__ import annotations

from typing import Annotated

import typer

from nvembed.commands.common import AsJson, RecipePath, Settings, ended, show
from nvembed.commands.complete import hardware_names
from nvembed.pipeline.exit_codes import ExitCode
from nvembed.types import UserError


def plan_command(
    path: RecipePath,
    hardware: Annotated[
        str, typer.Option(help="A machine of the catalogue, or a YAML file.", autocompletion=hardware_names)
    ] = "laptop",
    settings: Settings = None,
    fill: Annotated[float, typer.Option(help="Mean tokens of a text, as a share of max_length.")] = 0.5,
    rows: Annotated[
        list[str] | None,
        typer.Option(help="Rows that are mined: [NAME=]QUERIESxDOCUMENTS, such as nq=100kx2.7M; may be repeated."),
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Share of the peak that is reached, instead of the default.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of the whole machine per hour.")] = None,
    machines: Annotated[bool, typer.Option("--list", help="List the machines instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Parameters, operations, memory by part, storage, hours and cost of a recipe; what its mining takes."""

    def action() -> int:
        from nvembed.plan.corpora import parse_rows
        from nvembed.plan.hardware import CATALOGUE, find_hardware
        from nvembed.plan.recipe_plan import as_json as plain
        from nvembed.plan.recipe_plan import as_text, plan_recipe, with_price
        from nvembed.recipe.schema import load_recipe

        if machines:
            values = [machine.model_dump(mode="json") for machine in CATALOGUE.values()]
            lines = [
                f"{name:<12}{m.devices} x {m.device}, {m.memory_gib:g} GiB, {m.peak_tflops:g} TFLOP/s"
                for name, m in CATALOGUE.items()
            ]
            show(values, "\n".join(lines), as_json)
            return ExitCode.DONE
        for name, value in (("--fill", fill), ("--mfu", mfu)):
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} {value:g}: must be above 0 and at most 1")
        recipe = load_recipe(path, settings or [])
        machine = with_price(find_hardware(hardware), price, mfu)
        plan = plan_recipe(recipe, machine, fill=fill, rows=parse_rows(rows or []))
        show(plain(plan), as_text(plan), as_json)
        return ExitCode.DONE

    raise ended(action)
