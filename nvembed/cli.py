"""The `nvembed` command (layer 6), put together from `commands/`. Nothing heavy is imported before it is needed.

nvembed embed models:/nvembed-quickstart-teacher@champion texts.txt --out vectors.parquet --instruction web_search
nvembed recipe validate pipelines/recipes/quickstart.yaml
"""

from __future__ import annotations

import typer

from nvembed.commands import doctor, embed, export, recipe

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Embedding models: use and check them.",
)
app.command("embed")(embed.embed_command)
app.command("export")(export.export_command)
app.command("import")(export.import_command)
app.command("doctor")(doctor.doctor_command)
app.add_typer(recipe.app, name="recipe")


def main() -> None:
    """Entry point of the `nvembed` command."""
    app()


if __name__ == "__main__":
    main()
