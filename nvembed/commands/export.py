"""`nvembed export` and `nvembed import`: other forms of a model; model folders from NV-Embed checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from nvembed.commands.common import AsJson, ended, near_registry, show
from nvembed.pipeline.exit_codes import ExitCode, GatePreconditionError
from nvembed.types import UserError


def export_command(
    model: Annotated[str, typer.Argument(help="Model folder, or models:/name@alias of the registry.")],
    target: Annotated[str, typer.Argument(metavar="DIR", help="New folder.")],
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="sentence-transformers, onnx, onnx-int8, merged, adapter, folded or backbone.",
        ),
    ],
    texts: Annotated[str | None, typer.Option(help="txt, a text per line, to compare vectors on.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder of the adapter's base model.")] = None,
    registry: Annotated[str | None, typer.Option(help="Registry URI; see `nvembed embed`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write another form of a model, with its vectors compared. Exit code 5 when they differ too much."""

    def action() -> int:
        from nvembed.modeling.exports.forms import ExportSpec, ParityError, export_model
        from nvembed.registry.resolve import resolve_model

        given = _lines(texts) if texts is not None else ()
        folder = resolve_model(model, registry or (near_registry() if model.startswith("models:/") else None))
        spec = ExportSpec(Path(folder), Path(target), form, given, None if base is None else Path(base))
        try:
            with redirect_stdout(sys.stderr):  # DeepSpeed, which PEFT imports, logs to stdout; that is for the result
                record = export_model(spec)
        except ParityError as error:
            raise GatePreconditionError(f"{error}; nothing was written") from error
        show(record, _record_text(record, target), as_json)
        return ExitCode.DONE

    raise ended(action)


def import_command(
    source: Annotated[str, typer.Argument(help="Folder of an NV-Embed-v1/v2-shaped checkpoint: config, safetensors.")],
    target: Annotated[str, typer.Argument(metavar="DIR", help="New model folder.")],
    max_length: Annotated[int, typer.Option(min=8, help="Longest input in tokens.")] = 4096,
    as_json: AsJson = False,
) -> None:
    """Turn an NV-Embed checkpoint into a model folder, which can be used, exported and trained on."""

    def action() -> int:
        from nvembed.modeling.importing import import_nv_embed

        with redirect_stdout(sys.stderr):
            record = import_nv_embed(Path(source), Path(target), max_length=max_length)
        text = f"{target}: {record['parameters']:,} parameters, {record['dim']} dimensions, at most {max_length} tokens"
        show(record, f"{text}\nto train on, write in a recipe:\n{record['recipe']}", as_json)
        return ExitCode.DONE

    raise ended(action)


def _lines(path: str) -> tuple[str, ...]:
    try:
        lines = tuple(line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--texts {path}: cannot be read ({error})") from error
    if not lines:
        raise UserError(f"--texts {path}: no text in it")
    return lines


def _record_text(record: Mapping[str, Any], target: str) -> str:
    limit = "no limit" if record["limit"] is None else f"at most {record['limit']:g} is allowed"
    lines = [f"{target}: {record['form']}, {record['bytes'] / 2**20:,.1f} MiB"]
    for name, parity in record["parity"].items():
        lines.append(
            f"  {name}: {parity['texts']} texts, largest difference {parity['max_difference']:.2g} ({limit}), "
            f"smallest cosine {parity['min_cosine']:.6f}"
        )
    if not record["parity"]:
        lines.append("  not run: an adapter needs its base; give --base to compare vectors")
    if heads := record.get("head_parameters"):
        lines.append(f"  head: {heads['before']:,} parameters before, {heads['after']:,} folded")
    if base := record.get("base"):
        lines.append(f"  base: {base['name']}, weights {base['weights_xxh3_128']}")
    return "\n".join(lines)
