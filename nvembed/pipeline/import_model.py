"""The `import_model` step: a model made elsewhere becomes an artifact like those of the training steps."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from nvembed.core import storage
from nvembed.core.model_cache import written_folder
from nvembed.core.steps import Step, StepResult, load_artifact
from nvembed.registry.provenance import licences, trace
from nvembed.registry.resolve import hash_folder, resolve_model
from nvembed.types import Artifact, Config, UserError


class ImportConfig(Config):
    """Config of the `import_model` step.

    `content` is None for a registry reference: the run keeps the version that an alias named when the run began.
    """

    reference: str
    content: str | None
    registry: str | None = Field(None, exclude=True)


def import_config(reference: str, registry: str | None) -> ImportConfig:
    """The step's config: of a folder its content hash, of a registry reference the registry.

    Args:
        reference: model folder, or `models:/name@alias`.
        registry: URI of the registry.
    """
    if reference.startswith("models:/"):
        return ImportConfig(reference=reference, content=None, registry=registry)
    folder = resolve_model(reference)
    return ImportConfig(reference=folder, content=hash_folder(folder))


def _build(config: ImportConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    folder = resolve_model(config.reference, config.registry)
    with written_folder(storage.join(work_uri, "model")) as target:
        shutil.copytree(folder, target)
        files = sum(path.is_file() for path in target.rglob("*"))
        return StepResult(rows={"files": files}, metrics={"licences": _licences_of(folder)})


def _licences_of(folder: str) -> list[dict[str, str]]:
    """Licences of what a folder was made from, by the run it lies in; empty for any other folder."""
    try:
        artifact = load_artifact(str(Path(folder).parent), verify=False)
    except UserError:  # no manifest beside it, or another program's: the folder's model card states its licence
        return []
    return licences(trace(artifact, artifact))


IMPORT_MODEL = Step("import_model", 1, _build)
