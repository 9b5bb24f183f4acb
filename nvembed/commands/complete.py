"""Shell completion: names of files and of this package's own lists; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

RECIPES = "pipelines/recipes"


def recipe_files(incomplete: str) -> list[str]:
    """YAML files and folders that begin as typed, and the repository's recipes by their bare names."""
    paths = _paths(incomplete, (".yaml", ".yml"))
    here = Path(RECIPES)
    if "/" not in incomplete and here.is_dir():
        paths += sorted(str(path) for path in here.glob(f"{incomplete}*.yaml"))
    return paths


def model_folders(incomplete: str) -> list[str]:
    """Folders that begin as typed, and the model folders of runs below `runs/`."""
    from nvembed.core.steps import DESCRIPTION

    folders = _paths(incomplete, ())
    models = (str(path.parent) for path in Path("runs").glob(f"*/*/model/{DESCRIPTION}"))
    return sorted({*folders, *(model for model in models if model.startswith(incomplete))})


def hardware_names(incomplete: str) -> list[str]:
    """Machines of the catalogue."""
    from nvembed.plan.hardware import CATALOGUE

    return [name for name in CATALOGUE if name.startswith(incomplete)]


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    folder, _, start = incomplete.rpartition("/")
    root = Path(folder or ("/" if incomplete.startswith("/") else "."))
    if not root.is_dir():
        return []
    prefix = f"{folder}/" if folder or incomplete.startswith("/") else ""
    names = sorted(path for path in root.iterdir() if path.name.startswith(start) and not path.name.startswith("."))
    return [
        f"{prefix}{path.name}{'/' if path.is_dir() else ''}"
        for path in names
        if path.is_dir() or path.suffix in suffixes
    ]
