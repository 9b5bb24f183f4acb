"""Versions: a model folder with its scores, items, chain and licences, put into the registry and read back.

A version is one content: registering the same folder again completes its version after a killed run. Its artifacts:

    MLmodel, serving.py, requirements.txt, ...   the MLflow model (`flavours.py`)
    model.sentence_transformer/                  the model folder: the artifact of truth; README.md is its full card
    nvembed/scores.json, items.parquet           the evaluation, and its values item by item
    nvembed/provenance.json                      the hash chain (`provenance.py`)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvembed.core import storage
from nvembed.core.formats import own_version
from nvembed.core.steps import ITEMS, SCORES
from nvembed.modeling.origin import CARD, folder_content
from nvembed.registry import client as tags
from nvembed.registry import provenance as chains
from nvembed.registry.config import RegistrationConfig
from nvembed.registry.flavours import FOLDER, write_flavours
from nvembed.types import UserError

PRIMARY_METRICS = ("ndcg_at_10", "accuracy", "spearman")
RECORDS = "nvembed"


@dataclass(frozen=True)
class Submission:
    """A model folder with its evaluation and chain, to be registered.

    Attributes:
        folder: local model folder.
        scores: contents of the model's `scores.json`.
        items: bytes of its `items.parquet`.
        provenance: the hash chain, `provenance.trace`.
        tags: further tags of the version, such as manifest hashes.
    """

    folder: str
    scores: Mapping[str, Any]
    items: bytes
    provenance: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)


def primary_metric(metrics: Mapping[str, Any]) -> str:
    """The primary metric of a data set: nDCG@10 of retrieval, accuracy of classes, Spearman of graded pairs."""
    return next((name for name in PRIMARY_METRICS if name in metrics), next(iter(metrics)))


def primary_scores(scores: Mapping[str, Any], system: str = "model") -> dict[str, tuple[str, float]]:
    """data set -> (primary metric, value) of a system in the `scores.json` layout, 0-1."""
    primary = {}
    for dataset, metrics in scores["scores"].get(system, {}).items():
        if metrics:
            name = primary_metric(metrics)
            primary[dataset] = (name, float(metrics[name]["value"]))
    return primary


def mean_primary_score(scores: Mapping[str, Any], system: str = "model") -> float:
    """Mean over data sets of the primary metric of a system, 0-1."""
    values = [value for _, value in primary_scores(scores, system).values()]
    return sum(values) / len(values)


def add_version(client: Any, config: RegistrationConfig, submission: Submission) -> Any:
    """The version of a folder's content, made if missing (uploaded first: a version is never without its files).

    Its scores are those of the last evaluation. The alias `candidate` is moved to it.
    """
    content = folder_content(submission.folder)
    values = _tags(config, submission, content)
    same_content = [
        version
        for version in tags.list_versions(client, config.model_name)
        if version.tags.get(tags.CONTENT) == content and version.tags.get(tags.FORMAT) == str(tags.FORMAT_VERSION)
    ]
    if same_content:
        version = same_content[0]
        if version.tags.get(tags.EVALUATED) != values[tags.EVALUATED]:
            _upload_records(client, version, config, submission)
    else:
        version = _create(client, config, submission, content, values)
    tags.set_tags(client, version, values)
    client.set_registered_model_alias(config.model_name, tags.CANDIDATE, str(version.version))
    return client.get_model_version(config.model_name, str(version.version))


def _tags(config: RegistrationConfig, submission: Submission, content: str) -> dict[str, str]:
    scores = submission.scores
    return {
        **{f"nvembed.{key}": value for key, value in submission.tags.items()},
        tags.EVALUATED: submission.tags.get("evaluation_manifest_hash", storage.hash_json(scores)),
        "nvembed.recipe.schema": config.recipe_name,
        tags.FORMAT: str(tags.FORMAT_VERSION),
        tags.WRITER: own_version(),
        tags.CONTENT: content,
        tags.EVALUATION: json.dumps(scores["evaluation_hash"], sort_keys=True),
        tags.SCORES: json.dumps(scores["scores"], sort_keys=False),
        tags.SCORE: repr(mean_primary_score(scores)),
        tags.GATE_CONFIG: json.dumps(config.gate.model_dump(mode="json"), sort_keys=True),
        tags.LICENCES: json.dumps(chains.licences(submission.provenance), ensure_ascii=False),
    }


def _create(
    client: Any, config: RegistrationConfig, submission: Submission, content: str, values: Mapping[str, str]
) -> Any:
    name = config.model_name
    run = _ensure_run(client, config, content)
    with tempfile.TemporaryDirectory(prefix="nvembed-version-") as temporary:
        staged = Path(temporary, "version")
        write_flavours(staged, Path(submission.folder), name)
        client.log_artifacts(run.info.run_id, submission.folder, f"model/{FOLDER}")
        client.log_artifacts(run.info.run_id, str(staged), "model")
    _log_records(client, run.info.run_id, "model", config, submission)
    _ensure_registered_model(client, name)
    source = run.info.artifact_uri.rstrip("/") + "/model"
    return client.create_model_version(name, source, run.info.run_id, tags=dict(values))


def _upload_records(client: Any, version: Any, config: RegistrationConfig, submission: Submission) -> None:
    _log_records(client, version.run_id, str(version.source).rstrip("/").rsplit("/", 1)[-1], config, submission)


def _log_records(client: Any, run_id: str, place: str, config: RegistrationConfig, submission: Submission) -> None:
    """Log scores, items, chain, and the card with them."""
    with tempfile.TemporaryDirectory(prefix="nvembed-records-") as temporary:
        records = Path(temporary, RECORDS)
        records.mkdir()
        # Not storage.write_json: the order of the metrics says which is the primary one.
        text = json.dumps(submission.scores, indent=2, ensure_ascii=False) + "\n"
        (records / SCORES).write_text(text, encoding="utf-8")
        (records / ITEMS).write_bytes(submission.items)
        storage.write_json(str(records / chains.PROVENANCE), submission.provenance)
        card = Path(temporary, FOLDER, CARD)
        card.parent.mkdir()
        card.write_text(full_card(submission, config.model_name), encoding="utf-8")
        client.log_artifacts(run_id, temporary, place)


def full_card(submission: Submission, name: str) -> str:
    """README.md of a registered folder: with evaluation, licences and origin."""
    from nvembed.modeling.card import CardFacts, model_card
    from nvembed.modeling.config import EmbedderConfig
    from nvembed.modeling.folder import describe_folder

    description = describe_folder(submission.folder)
    provenance, scores = submission.provenance, submission.scores
    facts = CardFacts(
        name=name,
        scores=scores["scores"]["model"],
        tasks={dataset: str(row.get("task")) for dataset, row in chains.evaluated_datasets(provenance).items()},
        split=str(scores.get("split", "test")),
        licences=chains.licences(provenance),
        chain=chains.chain(provenance),
    )
    config = EmbedderConfig.model_validate(description["embedder"])
    return model_card(config, description["dim"], description["parameters"], description["prompts"], None, facts)


def _ensure_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _ensure_run(client: Any, config: RegistrationConfig, content: str) -> Any:
    """The step's run; where tracking has none, one of its own, which a resumed registration reuses."""
    if config.run_id is not None:
        return client.get_run(config.run_id)
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is None:
        experiment_id = client.create_experiment(config.experiment, config.artifact_root)
    else:
        experiment_id = experiment.experiment_id
    key = f"register/{config.model_name}/{content}"
    runs = client.search_runs([experiment_id], f"tags.`nvembed.key` = '{key}'", max_results=1)
    if runs:
        return runs[0]
    run = client.create_run(experiment_id, run_name=f"register {config.model_name}", tags={"nvembed.key": key})
    client.set_terminated(run.info.run_id)
    return run


# -- reading back ---------------------------------------------------------------------------------------------------


def source_of(client: Any, version: Any) -> str:
    """URI of a version's artifacts."""
    return str(client.get_model_version_download_uri(version.name, str(version.version))).rstrip("/")


def folder_source(client: Any, version: Any) -> str:
    """URI of a version's model folder."""
    inside = f"/{FOLDER}" if tags.version_format(version) > 1 else ""
    return source_of(client, version) + inside


@contextmanager
def version_records(client: Any, uri: str, version: Any) -> Iterator[Path]:
    """The directory with a version's scores, items and chain, fetched for the time of the block if need be.

    Raises:
        UserError: the version has none: it was registered by an older nvembed; or this one is too old for it.
    """
    if tags.version_format(version) == 1:
        raise UserError(
            f"version {version.version} of {version.name} was registered by an older nvembed, without items and chain. "
            "Run its recipe again into another --out, or promote another version over it by hand in MLflow."
        )
    source = f"{source_of(client, version)}/{RECORDS}"
    if is_here(source):
        yield storage.local_path(source)
        return
    from mlflow.artifacts import download_artifacts

    temporary = tempfile.mkdtemp(prefix="nvembed-records-")
    try:
        yield Path(download_artifacts(artifact_uri=source, dst_path=temporary, tracking_uri=uri))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_here(source: str) -> bool:
    """Whether artifacts lie on this machine's file system."""
    return source.startswith(("file:", "/")) and storage.is_local(source)


def read_provenance(records: Path) -> dict[str, Any]:
    """The chain among a version's records."""
    return dict(storage.read_json(str(records / chains.PROVENANCE)))


def champion_facts(client: Any, name: str, number: str | None) -> dict[str, Any] | None:
    """`{version, scores, evaluation_hash}` of a champion, as the report shows it; None where there is none."""
    if number is None:
        return None
    version = tags.get_version(client, name, number)
    return {
        "version": number,
        "scores": tags.json_tag(version, tags.SCORES),
        "evaluation_hash": tags.json_tag(version, tags.EVALUATION),
    }
