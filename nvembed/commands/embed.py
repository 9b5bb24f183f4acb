"""`nvembed embed`: a file of texts in, a file of vectors out."""

from __future__ import annotations

from typing import Annotated

import typer

from nvembed.commands.common import AsJson, Registry, ended, near_registry, show
from nvembed.commands.complete import model_folders
from nvembed.core.terminal import Console
from nvembed.pipeline.exit_codes import ExitCode
from nvembed.types import UserError


def embed_command(
    model: Annotated[str, typer.Argument(help="Model folder, or models:/name@alias.", autocompletion=model_folders)],
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
    cache: Annotated[str | None, typer.Option(help="Directory of earlier runs' vectors; known texts are read.")] = None,
    registry: Registry = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Embed a file of texts."""

    def action() -> int:
        from nvembed.registry.resolve import resolve_model
        from nvembed.retrieval.encode_file import EmbedRequest, ModelOptions, write_vectors
        from nvembed.retrieval.text_file import TextFile

        if instruction is not None and prompt_name is not None:
            raise UserError("give --instruction or --prompt-name, not both")
        if precision not in ("fp32", "bf16", "auto"):
            raise UserError(f"--precision {precision}: choose fp32, bf16 or auto")
        folder = resolve_model(model, registry or (near_registry() if model.startswith("models:/") else None))
        options = ModelOptions(folder, instruction, prompt_name, dim, batch_tokens, precision, threads)
        request = EmbedRequest(options, TextFile(source, text_column, title_column), out, force=force, cache=cache)
        console = Console()
        written = write_vectors(request, console.transient)
        console.clear()
        text = f"{out}: {written.rows:,} vectors of {written.dim} numbers"
        if written.truncated:
            text += f"; longer than {written.max_length} tokens and cut there: {written.truncated:,}"
        values = {"out": out, "rows": written.rows, "dim": written.dim, "truncated": written.truncated}
        show(values, text, as_json)
        return ExitCode.DONE

    raise ended(action)
