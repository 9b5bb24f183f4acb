"""The contents of the registry as plain values: lists, one version in full, two compared; export of a version."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from nvembed.core.steps import CorruptArtifactError
from nvembed.modeling.origin import CARD, folder_content
from nvembed.registry import client as tags
from nvembed.registry import provenance as chains
from nvembed.registry.champion import champions, effective, read_history
from nvembed.registry.config import GateConfig
from nvembed.registry.evidence import both_records, score_differences
from nvembed.registry.gate import CHECKS, Interval
from nvembed.registry.resolve import fetch_version
from nvembed.registry.versions import folder_source, is_here, read_provenance, source_of, version_records
from nvembed.types import UserError


def list_models(client: Any, name: str | None = None) -> list[dict[str, Any]]:
    """Every registered model, or one: name, aliases, versions (oldest first)."""
    names = tags.model_names(client) if name is None else [tags.get_model(client, name).name]
    models = []
    for model in names:
        aliases = tags.aliases(client, model)
        versions = [_summary(version, aliases) for version in tags.list_versions(client, model)]
        models.append({"name": model, "aliases": aliases, "versions": versions})
    return models


def _summary(version: Any, aliases: dict[str, str]) -> dict[str, Any]:
    number = str(version.version)
    score = version.tags.get(tags.SCORE)
    return {
        "version": number,
        "aliases": sorted(alias for alias, version_number in aliases.items() if version_number == number),
        "score": None if score is None else float(score),
        "recipe": version.tags.get("nvembed.recipe.schema"),
        "gate": version.tags.get(f"{tags.GATE}result"),
        "registered": int(version.creation_timestamp) // 1000,
    }


def show_version(client: Any, uri: str, version: Any) -> dict[str, Any]:
    """One version in full: scores with intervals, aliases, chain, licences, gate, history of the champion."""
    aliases = tags.aliases(client, version.name)
    try:
        with version_records(client, uri, version) as records:
            provenance = read_provenance(records)
        chain = [{"step": step, "manifest_hash": digest} for step, digest in chains.chain(provenance)]
        problems = chains.chain_problems(provenance, version.tags.get(tags.CONTENT))
    except UserError as error:  # a version of an older nvembed
        chain, problems = [], [str(error)]
    entries = read_history(client, version.name)
    current = aliases.get(tags.CHAMPION)
    return {
        "name": version.name,
        **_summary(version, aliases),
        "source": source_of(client, version),
        "content_hash": version.tags.get(tags.CONTENT),
        "git_revision": version.tags.get("nvembed.git_revision"),
        "run_id": version.run_id,
        "scores": tags.json_tag(version, tags.SCORES) or {},
        "evaluation_hash": tags.json_tag(version, tags.EVALUATION) or {},
        "licences": tags.json_tag(version, tags.LICENCES) or [],
        "chain": chain,
        "chain_problems": problems,
        "gate_config": tags.json_tag(version, tags.GATE_CONFIG),
        "gate_results": {
            name: version.tags[tags.GATE + name] for name in (*CHECKS, "champion") if tags.GATE + name in version.tags
        },
        "champion": current,
        "champions": champions(entries, current),
        "history": [dict(entry) for entry in effective(entries, current)],
    }


def compare_versions(client: Any, uri: str, a: Any, b: Any, config: GateConfig) -> dict[str, Any]:
    """Paired differences a - b with 95 % intervals, data set by data set and in the mean.

    Raises:
        UserError: they were not scored on the same items, or one was registered by an older nvembed.
    """
    with both_records(client, uri, a, b) as (first, second):
        differences = score_differences(first, second, config.samples, config.seed)
    rows = [_row(dataset, metric, delta) for dataset, (metric, delta) in differences.datasets.items()]
    return {
        "a": f"{a.name}/{a.version}",
        "b": f"{b.name}/{b.version}",
        "datasets": rows,
        "mean": {key: float(differences.mean[key]) for key in ("value", "low", "high")},
        "only_one": list(differences.only_one),
        "samples": config.samples,
    }


def _row(dataset: str, metric: str, delta: Interval) -> dict[str, Any]:
    return {"dataset": dataset, "metric": metric, **{key: float(delta[key]) for key in ("value", "low", "high")}}


def export_version(client: Any, uri: str, version: Any, target: Path) -> dict[str, Any]:
    """Write a version's model folder, its content checked, to a directory that does not exist yet.

    Raises:
        UserError: the target exists.
        CorruptArtifactError: the files are not those that were registered.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists and is not overwritten. Choose another directory.")
    folder = fetch_version(client, uri, version)
    partial = target.absolute().parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        shutil.copytree(folder, partial)
        _newest_card(client, uri, version, partial)
        if folder_content(str(partial)) != folder_content(folder):
            raise CorruptArtifactError(f"{target}: the copy differs from {folder}; is the disk full?")
        os.rename(partial, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = [path for path in target.rglob("*") if path.is_file()]
    return {
        "model": f"{version.name}/{version.version}",
        "folder": str(target),
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "content_hash": version.tags.get(tags.CONTENT),
    }


def _newest_card(client: Any, uri: str, version: Any, folder: Path) -> None:
    """A cached folder may have the card of an earlier evaluation."""
    source = folder_source(client, version)
    if is_here(source):
        return
    from mlflow.artifacts import download_artifacts

    download_artifacts(artifact_uri=f"{source}/{CARD}", dst_path=str(folder), tracking_uri=uri)
