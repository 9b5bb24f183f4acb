"""Parameters, weights and encode cost of the models of a run, where they are known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvembed.core import storage
from nvembed.modeling.shapes import folder_size
from nvembed.report.schema import Size
from nvembed.types import Artifact, UserError

POOLING = "1_Pooling"  # left out of the untrained backbone, which is scored with plain pooling


def model_sizes(
    artifacts: Mapping[str, Artifact],
    folders: Mapping[str, str],
    comparison: Mapping[str, Any] | None,
    recipe: Mapping[str, Any],
) -> dict[str, Size]:
    """Sizes by system: teacher, student, untrained, minilm; one that lies elsewhere or is gone is left out.

    Args:
        artifacts: by step.
        folders: model folder by role.
        comparison: `comparison.json` of the student.
        recipe: resolved; names the reference model.
    """
    found: dict[str, Size] = {}
    for role, folder in folders.items():
        cost = comparison["encode_cost"].get(role) if comparison else None
        if comparison is not None:
            dim = _width(_local(folder))
            sizes = {what: comparison[what][role] for what in ("parameters", "bytes")}
            found[role] = Size(**sizes, dim=dim, encode_seconds=cost)
        else:
            _add(found, role, _local(folder))
    if "initialise" in artifacts:
        _add(found, "untrained", _local(artifacts["initialise"].path("model")), without=POOLING)
    _add(found, "minilm", _reference(recipe.get("baselines") or {}))
    return found


def _add(found: dict[str, Size], name: str, folder: Path | None, without: str = "") -> None:
    if folder is None or not any(folder.rglob("*.safetensors")):
        return
    size = folder_size(folder)
    less = folder_size(folder / without) if without else {"parameters": 0, "bytes": 0}
    parts = {what: size[what] - less[what] for what in size}
    found[name] = Size(**parts, dim=_width(folder), encode_seconds=None)


def _local(uri: str) -> Path | None:
    path = storage.local_path(uri) if storage.is_local(uri) else None
    return path if path is not None and path.is_dir() else None


def _width(folder: Path | None) -> int | None:
    """Numbers of an embedding; a backbone's states are its embeddings."""
    path = folder / "config.json" if folder is not None else None
    width = json.loads(path.read_bytes()).get("hidden_size") if path is not None and path.is_file() else None
    return width if isinstance(width, int) else None


def _reference(baselines: Mapping[str, Any]) -> Path | None:
    """Folder of the reference model, if it lies on this machine."""
    from nvembed.retrieval.encoders import package_folder

    reference = baselines.get("reference") or {}
    if reference.get("type") != "package":
        return _local(reference["name"]) if reference.get("name") else None
    try:
        return package_folder(reference["package"])
    except UserError:
        return None
