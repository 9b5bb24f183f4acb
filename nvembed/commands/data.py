"""`nvembed data`: prepared data sets in the formats of other libraries.

nvembed data convert runs/quickstart --dataset cwe --to beir --out cwe-beir
"""

from __future__ import annotations

from typing import Annotated

import typer

from nvembed.commands.common import AsJson, ended, show
from nvembed.core import storage
from nvembed.pipeline.exit_codes import ExitCode
from nvembed.types import Artifact, UserError

BEIR = "beir"
FORMATS = (BEIR, "sentence-transformers", "flag-embedding", "tevatron", "labelled", "graded")

app = typer.Typer(no_args_is_help=True, help="Prepared data sets: convert to other formats.")


@app.command("convert")
def convert_command(
    source: Annotated[str, typer.Argument(metavar="RUN", help="Output of a run, or its `prepare` directory.")],
    form: Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"{', '.join(FORMATS)}.")],
    out: Annotated[
        str, typer.Option(help="New folder (beir), or file: .jsonl, .csv, .tsv, .parquet, also compressed. Any URI.")
    ],
    dataset: Annotated[str | None, typer.Option(help="Data set of the run; may be left out where it has one.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, dev or test; by default train, and all of them for beir.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a prepared data set in the format of another library.

    beir: a folder with corpus.jsonl, queries.jsonl, qrels/. sentence-transformers (anchor, positive, negative_n),
    flag-embedding (query, pos, neg) and tevatron: a row per example of a retrieval set. labelled (text, label):
    classes and clusters. graded (sentence1, sentence2, score): graded pairs.
    """

    def action() -> int:
        from nvembed.data.tables import dataset_info
        from nvembed.data.writers import write_dataset

        if form not in FORMATS:
            raise UserError(f"--to {form}: choose one of {', '.join(FORMATS)}")
        if storage.exists(out) or storage.list_directory(out):
            raise UserError(f"{out} exists. Choose another --out.")
        artifact = _prepared(source)
        name = dataset or _only_dataset(artifact)
        part = split or (None if form == BEIR else "train")
        write_dataset(artifact, name, part, form, out)
        recorded = dataset_info(artifact)[name]
        counts = {key: recorded[key] for key in ((part,) if part else ("train", "dev", "test"))}
        text = f"{out}: {name}, {', '.join(f'{count:,} {key}' for key, count in counts.items())} examples"
        show({"out": out, "dataset": name, "format": form, "examples": counts}, text, as_json)
        return ExitCode.DONE

    raise ended(action)


def _prepared(source: str) -> Artifact:
    """The `prepare` artifact at a URI, or in the output of a run there."""
    from nvembed.core.steps import MANIFEST, load_artifact

    inside = storage.join(source, "prepare")
    artifact = load_artifact(inside if storage.exists(storage.join(inside, MANIFEST)) else source)
    kind = artifact.manifest.get("kind")
    if kind != "prepare":
        raise UserError(
            f"{source} is the artifact of a {kind} step. Give the output of a run, or its prepare directory."
        )
    return artifact


def _only_dataset(artifact: Artifact) -> str:
    from nvembed.data.tables import dataset_info

    names = list(dataset_info(artifact))
    if len(names) > 1:
        raise UserError(f"which data set? Give --dataset with one of: {', '.join(names)}")
    return names[0]
