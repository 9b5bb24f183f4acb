"""The output directory of a run: one recipe and one pipeline per output, no foreign files."""

from __future__ import annotations

from typing import Any

import yaml

from nvembed.core import storage
from nvembed.core.lease import LEASE
from nvembed.core.steps import (
    MLFLOW_ARTIFACTS,
    MLFLOW_DB,
    RECIPE,
    RECORDS,
    REPORT_HTML,
    REPORT_JSON,
    ChangedRecipeError,
    CorruptArtifactError,
    differences,
)
from nvembed.recipe.schema import Recipe, load_recipe, resolved_yaml
from nvembed.report.attempts import read_attempts
from nvembed.tracking.tracker import STATE
from nvembed.types import UserError

FREE_SECTIONS = ("cluster", "tracking")  # where a run computes and what it reports to; neither changes a result
# names a run writes at the root of its output: a directory that has one of them but no recipe is not a run's
ROOT_NAMES = (RECORDS, STATE, REPORT_JSON, REPORT_HTML, MLFLOW_DB, MLFLOW_ARTIFACTS, "logs")


def check_output(recipe: Recipe, out: str, pipeline: str) -> None:
    """Refuse an output of another recipe or pipeline, and a directory that no run made.

    Args:
        pipeline: its name.

    Raises:
        ChangedRecipeError: with every difference.
        UserError: it is a file; the directory holds files named like a run's, but no recipe; or another pipeline made
            it, whose report this one would replace by that of its own steps.
    """
    if storage.is_local(out):
        for place in (local := storage.local_path(out), *local.parents):
            if place.is_file():
                raise UserError(f"{place} is a file, not a directory. Choose another --out.")
    path = storage.join(out, RECIPE)
    if not storage.exists(path):
        names = set(storage.list_directory(out))
        foreign = sorted(names & set(ROOT_NAMES))
        if foreign and LEASE not in names:
            raise UserError(f"{out} holds {', '.join(foreign)} that no run made. Choose another --out.")
        return
    changes = differences(_fixed_sections(_stored_recipe(path)), _fixed_sections(recipe.model_dump(mode="json")))
    if changes:
        listed = "\n  ".join(changes)
        raise ChangedRecipeError(
            f"{out} was made with another recipe ({path}):\n  {listed}\n"
            "Use another --out, or restore the recipe it was made with."
        )
    other = next((name for attempt in reversed(read_attempts(out)) if (name := attempt.get("pipeline"))), pipeline)
    if other != pipeline:
        raise UserError(
            f"{out} was made by the pipeline {other}; {pipeline} would replace its report. Choose another --out."
        )


def _stored_recipe(path: str) -> dict[str, Any]:
    """The stored recipe with today's defaults filled in; as written where this version refuses it."""
    try:
        return load_recipe(path).model_dump(mode="json")
    except UserError:
        try:
            stored = yaml.safe_load(storage.read_bytes(path))
        except (yaml.YAMLError, ValueError) as error:
            raise CorruptArtifactError(f"{path} cannot be read ({error}). Move {path} away.") from error
        return stored if isinstance(stored, dict) else {"recipe": stored}


def _fixed_sections(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in FREE_SECTIONS}


def claim_output(recipe: Recipe, out: str, pipeline: str) -> None:
    """Write the resolved recipe into a new output. Checks again, under the lease: another run may have been faster."""
    check_output(recipe, out, pipeline)
    path = storage.join(out, RECIPE)
    if not storage.exists(path):
        storage.write_bytes(path, resolved_yaml(recipe).encode())
