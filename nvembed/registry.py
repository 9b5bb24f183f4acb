"""The model registry: versions of model folders, their scores, the aliases `candidate` and `champion` (layer 3).

A version is one content: registering the same folder again finds the version it has and mends whatever a killed run
left undone. `candidate` is the last registered version; `champion` moves only to a version that scored better on
exactly the same evaluation sets.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from nvembed import storage
from nvembed.mlflow_store import Store, prepare_environment, probe
from nvembed.types import Artifact, Config

CANDIDATE = "candidate"
CHAMPION = "champion"
REGISTRATION = "registration.json"
PRIMARY_METRICS = ("ndcg_at_10", "accuracy", "spearman")
_CONTENT = "nvembed.content_hash"
_SCORE = "nvembed.score"
_EVALUATION = "nvembed.evaluation_hash"


class RegisterConfig(Config):
    """Names in the registry, and whether the run may move `champion`."""

    enabled: bool = True
    teacher_name: str = Field("nvembed-teacher", pattern=r"^[\w\-. ]+$")
    student_name: str = Field("nvembed-student", pattern=r"^[\w\-. ]+$")
    auto_promote: bool = False


class RegistrationConfig(Config):
    """The `register` step of one model. What only says where things lie is no part of its fingerprint."""

    model_name: str
    recipe_name: str
    auto_promote: bool = False
    registry: str | None = Field(None, description="The configured tracking URI; null: the output's own store.")
    experiment: str = "nvembed"
    tracking_uri: str = Field(exclude=True)
    artifact_root: str | None = Field(None, exclude=True)
    run_id: str | None = Field(None, exclude=True, description="The step's run; null makes one.")


def registration_config(
    register: RegisterConfig, model_name: str, recipe_name: str, experiment: str, store: Store, run_id: str | None
) -> RegistrationConfig:
    """The step's config from the recipe's sections and the resolved store."""
    return RegistrationConfig(
        model_name=model_name,
        recipe_name=recipe_name,
        auto_promote=register.auto_promote,
        registry=store.configured,
        experiment=experiment,
        tracking_uri=store.uri,
        artifact_root=store.artifact_root,
        run_id=run_id,
    )


def open_registry(uri: str) -> Any:
    """An MlflowClient for the registry at `uri`.

    Raises:
        UserError: it does not answer.
    """
    try:
        probe(uri)
    except Exception as error:  # sqlite3.Error, OSError and what urllib makes of a mistyped URI
        raise storage.UserError(
            f"the model registry at {uri} does not answer ({error}). Start it, or correct tracking.uri or "
            "MLFLOW_TRACKING_URI, and run again: what is finished stays."
        ) from error
    prepare_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def content_hash(folder: str) -> str:
    """Hash of a model folder's file names and checksums: equal folders are one version."""
    files = storage.describe_files(folder)
    if not files:
        raise storage.UserError(f"{folder}: no model folder (it is empty or missing)")
    return storage.hash_json({name: entry["xxh3_128"] for name, entry in files.items()})


def primary_metric(metrics: Mapping[str, Any]) -> str:
    """The metric a data set is judged by: nDCG@10 of retrieval, accuracy of classes, Spearman of graded pairs."""
    return next((name for name in PRIMARY_METRICS if name in metrics), next(iter(metrics)))


def mean_primary_score(scores: Mapping[str, Any], system: str = "model") -> float:
    """Mean over data sets of the primary metric of a system in the `scores.json` layout, 0-1."""
    values = [metrics[primary_metric(metrics)]["value"] for metrics in scores["scores"][system].values()]
    return sum(values) / len(values)


def register_model(
    config: RegistrationConfig, folder: str, scores: Mapping[str, Any], tags: Mapping[str, str]
) -> dict[str, Any]:
    """Register a model folder: upload, version, tags, `candidate`, and `champion` where that was earned.

    Args:
        config: which name, where, and whether `champion` may move.
        folder: local model folder.
        scores: contents of the model's `scores.json`.
        tags: further tags of the version, such as manifest hashes.

    Returns:
        name, version, registry_uri, content_hash, run_id, score, aliases (of this version), promoted, reason.

    Raises:
        UserError: the registry does not answer, or there is no such folder.
    """
    client = open_registry(config.tracking_uri)
    content = content_hash(folder)
    score = mean_primary_score(scores)
    values = {
        **{f"nvembed.{key}": value for key, value in tags.items()},
        "nvembed.recipe": config.recipe_name,
        _CONTENT: content,
        _EVALUATION: json.dumps(scores["evaluation_hash"], sort_keys=True),
        "nvembed.scores": json.dumps(scores["scores"], sort_keys=False),
        _SCORE: repr(score),
    }
    version = _ensure_version(client, config, folder, content, values)
    number = str(version.version)
    for key, value in values.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(config.model_name, number, key, value)
    client.set_registered_model_alias(config.model_name, CANDIDATE, number)
    promoted, reason = _promote(client, config, number, score, scores["evaluation_hash"])
    return {
        "name": config.model_name,
        "version": number,
        "registry_uri": f"models:/{config.model_name}/{number}",
        "content_hash": content,
        "run_id": version.run_id,
        "score": score,
        "aliases": _aliases(client, config.model_name, number),
        "promoted": promoted,
        "reason": reason,
    }


def _aliases(client: Any, name: str, number: str) -> list[str]:
    found = client.get_registered_model(name).aliases
    return sorted(alias for alias, version in found.items() if str(version) == number)


def _ensure_version(client: Any, config: RegistrationConfig, folder: str, content: str, tags: Mapping[str, str]) -> Any:
    """The version with this content, made (uploaded first, so that a version is never without its files) if missing."""
    name = config.model_name
    found = [
        version for version in client.search_model_versions(f"name = '{name}'") if version.tags.get(_CONTENT) == content
    ]
    if found:
        return min(found, key=lambda version: int(version.version))
    run = _ensure_run(client, config, content)
    client.log_artifacts(run.info.run_id, folder, "model")
    _ensure_registered_model(client, name)
    source = run.info.artifact_uri.rstrip("/") + "/model"
    return client.create_model_version(name, source, run.info.run_id, tags=dict(tags))


def _ensure_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _ensure_run(client: Any, config: RegistrationConfig, content: str) -> Any:
    """The step's run; where tracking has none, one of our own that a resumed registration finds again."""
    if config.run_id is not None:
        return client.get_run(config.run_id)
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is None:
        experiment_id = client.create_experiment(config.experiment, config.artifact_root)
    else:
        experiment_id = experiment.experiment_id
    key = f"register/{config.model_name}/{content}"
    found = client.search_runs([experiment_id], f"tags.`nvembed.key` = '{key}'", max_results=1)
    if found:
        return found[0]
    run = client.create_run(experiment_id, run_name=f"register {config.model_name}", tags={"nvembed.key": key})
    client.set_terminated(run.info.run_id)
    return run


def _promote(
    client: Any, config: RegistrationConfig, number: str, score: float, evaluation: Mapping[str, str]
) -> tuple[bool, str]:
    """Move `champion` to this version if it earned it; whether it did, and why (not)."""
    name = config.model_name
    current = client.get_registered_model(name).aliases.get(CHAMPION)
    if current is not None and str(current) == number:
        return True, f"version {number} is champion"
    if not config.auto_promote:
        return False, "auto_promote is off"
    if current is None:
        client.set_registered_model_alias(name, CHAMPION, number)
        return True, "there was no champion"
    tags = client.get_model_version(name, current).tags
    if _SCORE not in tags or json.loads(tags.get(_EVALUATION, "{}")) != dict(evaluation):
        return False, f"champion {current} was scored on other evaluation sets (their hashes differ)"
    theirs = float(tags[_SCORE])
    compared = f"mean primary score {score:.4f} against {theirs:.4f} of champion {current}"
    if score <= theirs:
        return False, f"{compared}: not better"
    client.set_registered_model_alias(name, CHAMPION, number)
    return True, compared


def _build(config: RegistrationConfig, inputs: Mapping[str, Artifact], work_uri: str) -> storage.StepResult:
    model, scores = inputs["model"], inputs["scores"]
    tags = {
        "manifest_hash": model.manifest_hash,
        "evaluation_manifest_hash": scores.manifest_hash,
        "git_revision": storage.git_revision() or "unknown",
    }
    folder = str(storage.local_path(model.path("model")))
    registration = register_model(config, folder, storage.read_json(scores.path("scores.json")), tags)
    storage.write_json(storage.join(work_uri, REGISTRATION), registration)
    return storage.StepResult(metrics={"score": registration["score"], "promoted": registration["promoted"]})


REGISTER = storage.Step("register", 1, _build)


# -- from the registry back to a folder -----------------------------------------------------------------------------


def resolve_model(reference: str, tracking_uri: str | None = None, cache: Path | None = None) -> str:
    """The local folder of a model given as a folder, `models:/name@alias` or `models:/name/version`.

    A version whose files lie on this machine is used in place; any other is downloaded once into the cache and
    checked against the content hash it was registered with.

    Args:
        reference: folder or registry URI.
        tracking_uri: the registry; default MLFLOW_TRACKING_URI.
        cache: default `$XDG_CACHE_HOME/nvembed/models` or `~/.cache/nvembed/models`.

    Raises:
        UserError: no such folder, name, version or alias (with those that exist), or no registry given.
        CorruptArtifactError: the files are not those that were registered.
    """
    if not reference.startswith("models:/"):
        if not Path(reference).is_dir():
            raise storage.UserError(f"{reference}: no such model folder; give a folder or models:/name@alias")
        return str(Path(reference).absolute())
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise storage.UserError(
            f"{reference}: which registry? Set MLFLOW_TRACKING_URI, for example sqlite:////path/of/the/output/mlflow.db"
        )
    client = open_registry(uri)
    version = _find_version(client, reference)
    expected = version.tags.get(_CONTENT)
    source = client.get_model_version_download_uri(version.name, version.version)
    if source.startswith(("file:", "/")) and storage.is_local(source):
        return _checked(str(storage.local_path(source)), expected, reference)
    return _download(uri, source, expected, reference, cache or _default_cache())


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nvembed" / "models"


def _find_version(client: Any, reference: str) -> Any:
    from mlflow.exceptions import MlflowException

    name, at, alias = reference.removeprefix("models:/").partition("@")
    number = ""
    if not at:
        name, _, number = name.partition("/")
    if not name or not (alias or number):
        raise storage.UserError(f"{reference}: write models:/name@alias or models:/name/version")
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        known = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none"
        raise storage.UserError(f"{reference}: the registry has no model {name}; it has: {known}") from error
    if alias:
        number = str(aliases.get(alias, ""))
        if not number:
            known = ", ".join(f"@{key} (version {value})" for key, value in sorted(aliases.items()))
            raise storage.UserError(f"{reference}: {name} has no alias {alias}; it has: {known or 'none'}")
    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        found = sorted(int(version.version) for version in client.search_model_versions(f"name = '{name}'"))
        known = ", ".join(map(str, found)) or "none"
        raise storage.UserError(f"{reference}: {name} has no version {number}; it has: {known}") from error


def _checked(folder: str, expected: str | None, reference: str) -> str:
    if expected is not None and content_hash(folder) != expected:
        raise storage.CorruptArtifactError(f"{reference}: the files at {folder} are not those that were registered")
    return folder


def _download(uri: str, source: str, expected: str | None, reference: str, cache: Path) -> str:
    from mlflow.artifacts import download_artifacts

    target = cache / (expected or storage.hash_json([uri, source]))
    if not target.is_dir():
        partial = cache / f"{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        partial.mkdir(parents=True)
        try:
            fetched = download_artifacts(artifact_uri=source, dst_path=str(partial), tracking_uri=uri)
            _checked(fetched, expected, reference)
            os.replace(fetched, target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return _checked(str(target), expected, reference)
