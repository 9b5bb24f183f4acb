"""`nvembed registry`: registered models, their scores, and which version is champion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from nvembed.commands.common import AsJson, Registry, ended, near_registry, show
from nvembed.pipeline.exit_codes import ExitCode, GatePreconditionError

app = typer.Typer(no_args_is_help=True, help="Versions of trained models: look, compare, promote, roll back, export.")
Reference = Annotated[str, typer.Argument(metavar="MODEL", help="NAME/VERSION or NAME@ALIAS; NAME is its candidate.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Registered model.")]


@contextmanager
def opened(registry: str | None) -> Iterator[tuple[Any, str]]:
    """The registry's client and URI; a refused promotion ends with exit code 5."""
    from nvembed.registry.champion import PromotionRefusedError
    from nvembed.registry.client import answering, open_registry
    from nvembed.registry.resolve import registry_uri

    uri = registry_uri(registry or near_registry(), "registry")
    client = open_registry(uri)
    try:
        with answering(uri):
            yield client, uri
    except PromotionRefusedError as error:
        raise GatePreconditionError(str(error)) from error


def referenced_version(client: Any, reference: str) -> Any:
    """The version of a reference; a bare name is its candidate."""
    from nvembed.registry.client import CANDIDATE, find_version

    name = reference.removeprefix("models:/")
    return find_version(client, name if "@" in name or "/" in name else f"{name}@{CANDIDATE}")


@app.command("list")
def list_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this model.")] = None,
    registry: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Registered models and their versions."""

    def action() -> int:
        from nvembed.registry.describe import list_models

        with opened(registry) as (client, _):
            models = list_models(client, name)
        show(models, "\n".join(_model_lines(models)) or "no model is registered", as_json)
        return ExitCode.DONE

    raise ended(action)


@app.command("show")
def show_command(model: Reference, registry: Registry = None, as_json: AsJson = False) -> None:
    """One version: scores with intervals, aliases, provenance, licences, results of the gate."""

    def action() -> int:
        from nvembed.registry.describe import show_version

        with opened(registry) as (client, uri):
            version = show_version(client, uri, referenced_version(client, model))
        show(version, "\n".join(_version_lines(version)), as_json)
        return ExitCode.DONE

    raise ended(action)


@app.command("promote")
def promote_command(
    model: Reference,
    margin: Annotated[float | None, typer.Option(min=0, max=1, help="Instead of the recipe's gate.margin.")] = None,
    floor: Annotated[float | None, typer.Option(min=0, max=1, help="Instead of the recipe's gate.floor.")] = None,
    registry: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Make a version champion, if it passes the gate. Exit code 5 when it does not, or another promotion was first."""

    def action() -> int:
        from nvembed.registry.champion import PromotionRefusedError, promote_candidate
        from nvembed.registry.client import CHAMPION, aliases
        from nvembed.registry.evidence import evaluate_gate, gate_config

        with opened(registry) as (client, uri):
            version = referenced_version(client, model)
            number = str(version.version)
            if aliases(client, version.name).get(CHAMPION) == number:
                value = {
                    "name": version.name,
                    "version": number,
                    "champion_before": number,
                    "promoted": False,
                    "gate": None,
                }
                show(value, f"version {number} of {version.name} is champion already", as_json)
                return ExitCode.DONE
            limits = {key: value for key, value in (("margin", margin), ("floor", floor)) if value is not None}
            result = evaluate_gate(client, uri, version.name, number, gate_config(version).model_copy(update=limits))
            value = {
                "name": version.name,
                "version": number,
                "champion_before": result.champion,
                "gate": result.as_json(),
            }
            try:
                promote_candidate(client, result)
            except PromotionRefusedError as refused:
                if as_json:
                    show({**value, "promoted": False, "reason": str(refused)}, "", as_json)
                raise
        lines = [f"  {check.name}: {check.state}: {check.message}" for check in result.checks]
        was = "there was none" if result.champion is None else f"it was version {result.champion}"
        text = "\n".join([*lines, f"champion of {version.name} is version {number} now ({was})"])
        show({**value, "promoted": True}, text, as_json)
        return ExitCode.DONE

    raise ended(action)


@app.command("rollback")
def rollback_command(name: Name, registry: Registry = None, as_json: AsJson = False) -> None:
    """Put the previous champion back. Exit code 5 when there is none or another promotion was first."""

    def action() -> int:
        from nvembed.registry.champion import roll_back

        with opened(registry) as (client, _):
            before, after = roll_back(client, name)
        value = {"name": name, "champion": after, "champion_before": before}
        show(value, f"champion of {name} is version {after} again (it was version {before})", as_json)
        return ExitCode.DONE

    raise ended(action)


@app.command("compare")
def compare_command(
    a: Annotated[str, typer.Argument(metavar="A", help="NAME/VERSION or NAME@ALIAS.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; may be of another model.")],
    samples: Annotated[int, typer.Option(min=100, help="Draws of the bootstrap.")] = 1000,
    registry: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Paired differences A - B over the same held-out items, with 95 % intervals."""

    def action() -> int:
        from nvembed.registry.config import GateConfig
        from nvembed.registry.describe import compare_versions

        with opened(registry) as (client, uri):
            versions = [referenced_version(client, reference) for reference in (a, b)]
            comparison = compare_versions(client, uri, versions[0], versions[1], GateConfig(samples=samples))
        show(comparison, "\n".join(_comparison_lines(comparison)), as_json)
        return ExitCode.DONE

    raise ended(action)


@app.command("export")
def export_command(
    model: Reference,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; must not exist.")],
    registry: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Write a version's model folder, its files checked against what was registered."""

    def action() -> int:
        from nvembed.registry.describe import export_version

        with opened(registry) as (client, uri):
            export = export_version(client, uri, referenced_version(client, model), target)
        text = f"{export['folder']}: {export['model']}, {export['files']} files, {export['bytes'] / 1e6:,.1f} MB"
        show(export, text, as_json)
        return ExitCode.DONE

    raise ended(action)


# -- as text --------------------------------------------------------------------------------------------------------


def _table(head: list[str], rows: list[list[str]], indent: str = "  ") -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]


def _model_lines(models: list[dict[str, Any]]) -> Iterator[str]:
    for model in models:
        yield model["name"]
        rows = [
            [
                version["version"],
                "-" if version["score"] is None else f"{version['score']:.4f}",
                version["gate"] or "-",
                _day(version["registered"]),
                version["recipe"] or "-",
                ", ".join(version["aliases"]),
            ]
            for version in model["versions"]
        ]
        yield from _table(["version", "mean score", "gate", "registered", "recipe", "aliases"], rows)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _interval(row: Mapping[str, float], write: Callable[[float], str]) -> str:
    return f"{write(row['value'])} [{write(row['low'])}, {write(row['high'])}]"


def _version_lines(version: Mapping[str, Any]) -> Iterator[str]:
    aliases = ", ".join(version["aliases"]) or "none"
    registered = _day(version["registered"])
    yield f"{version['name']} version {version['version']}, aliases: {aliases}, registered {registered}"
    yield f"  files: {version['source']}"
    yield f"  content: {version['content_hash']}"
    for system, datasets in version["scores"].items():
        yield f"scores of {system} (0-1, 95 % interval)"
        rows = [
            [dataset, metric, _interval(row, lambda value: f"{value:.4f}")]
            for dataset, metrics in datasets.items()
            for metric, row in metrics.items()
        ]
        yield from _table(["data set", "metric", "value"], rows)
    yield "made by"
    yield from _table(["step", "manifest"], [[row["step"], row["manifest_hash"]] for row in version["chain"]])
    yield from (f"  ! {problem}" for problem in version["chain_problems"])
    yield "licences of what it was made from"
    yield from _table(
        ["", "name", "licence"], [[row["kind"], row["name"], row["licence"]] for row in version["licences"]]
    )
    yield "gate"
    yield from (f"  {name}: {result}" for name, result in version["gate_results"].items())
    yield f"champions so far: {' -> '.join(version['champions']) or 'none'}"


def _comparison_lines(comparison: Mapping[str, Any]) -> Iterator[str]:
    from nvembed.registry.gate import points

    a, b, draws = comparison["a"], comparison["b"], comparison["samples"]
    yield f"{a} minus {b}, points of 100, paired, 95 % interval ({draws} draws)"
    rows = [[row["dataset"], row["metric"], _interval(row, points)] for row in comparison["datasets"]]
    yield from _table(
        ["data set", "metric", "difference"], [*rows, ["mean", "", _interval(comparison["mean"], points)]]
    )
    if comparison["only_one"]:
        yield f"scored for one of them only, left out: {', '.join(comparison['only_one'])}"
