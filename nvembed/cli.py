"""The `nvembed` command. Its commands are in `commands/`, one file each.

nvembed embed models:/nvembed-quickstart-teacher@champion texts.txt --out vectors.parquet --instruction web_search
nvembed recipe validate pipelines/recipes/quickstart.yaml
"""

from __future__ import annotations

from nvembed.pipeline.signals import end_quietly_on_interrupt


def main() -> None:
    """Entry point of the `nvembed` command."""
    end_quietly_on_interrupt()  # before the commands' libraries load
    from nvembed.commands.app import app

    app()


if __name__ == "__main__":
    main()
