"""`nvembed search`: one query against a corpus, to try a model by hand."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import Annotated

import typer

from nvembed.commands.common import AsJson, Registry, ended, near_registry, show
from nvembed.commands.complete import model_folders
from nvembed.core.terminal import Console
from nvembed.pipeline.exit_codes import ExitCode
from nvembed.types import UserError


def search_command(
    model: Annotated[
        str,
        typer.Argument(help="Model folder, or models:/name@alias of the registry.", autocompletion=model_folders),
    ],
    corpus: Annotated[str, typer.Argument(help="txt, jsonl or parquet file, or a BEIR folder.")],
    query: Annotated[str, typer.Argument(help="What is searched for.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Documents shown.")] = 10,
    instruction: Annotated[
        str | None, typer.Option(help="Task of the query: a sentence, or a key of the catalogue.")
    ] = None,
    prompt_name: Annotated[str | None, typer.Option(help="A prompt stored in the model folder, instead.")] = None,
    vectors: Annotated[
        str | None, typer.Option(help="Vectors of the corpus that `nvembed embed` wrote; embedded now otherwise.")
    ] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Matryoshka prefix; the full width by default.")] = None,
    text_column: Annotated[str, typer.Option(help="Where the text is, in jsonl and parquet.")] = "text",
    title_column: Annotated[str | None, typer.Option(help="Title put before the text.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto (bf16 where the processor has it).")] = "fp32",
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads.")] = None,
    registry: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Show the documents of a corpus that are nearest to a query: score, id, text. Nothing is written."""

    def action() -> int:
        from nvembed.registry.resolve import resolve_model
        from nvembed.retrieval.encode_file import ModelOptions, stored_prompts
        from nvembed.retrieval.search_corpus import SearchRequest, as_text, corpus_source, search
        from nvembed.retrieval.text_file import TextFile

        if instruction is not None and prompt_name is not None:
            raise UserError("give --instruction or --prompt-name, not both")
        if precision not in ("fp32", "bf16", "auto"):
            raise UserError(f"--precision {precision}: choose fp32, bf16 or auto")
        console = Console()
        folder = resolve_model(model, registry or (near_registry() if model.startswith("models:/") else None))
        prompts = [name for name, prompt in stored_prompts(folder).items() if prompt and name != "document"]
        if instruction is None and prompt_name is None and prompts:
            console.line(f"no instruction; this model was trained with --prompt-name {' | '.join(prompts)}")
        source, title = corpus_source(corpus)
        options = ModelOptions(folder, instruction, prompt_name, dim, precision=precision, threads=threads)
        request = SearchRequest(options, TextFile(source, text_column, title_column or title), query, k, vectors)
        hits = search(request, console.transient)
        console.clear()
        width = shutil.get_terminal_size((120, 24)).columns
        show([asdict(hit) for hit in hits], as_text(hits, width), as_json)
        return ExitCode.DONE

    raise ended(action)
