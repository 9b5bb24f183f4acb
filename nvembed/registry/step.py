"""The `register` step: a model folder becomes a version, passes the gate or not, and may become champion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nvembed.core import storage
from nvembed.core.runtime import git_revision
from nvembed.core.steps import ITEMS, SCORES, Step, StepResult
from nvembed.registry import client as tags
from nvembed.registry import provenance as chains
from nvembed.registry.champion import PromotionRefusedError, champion_before, promote_candidate, read_history
from nvembed.registry.client import RegistryAwayError, answering, open_registry
from nvembed.registry.config import RegisterConfig, RegistrationConfig
from nvembed.registry.evidence import evaluate_gate, retrieval_interval
from nvembed.registry.versions import Submission, add_version, champion_facts
from nvembed.tracking.store import Store
from nvembed.types import Artifact

REGISTRATION = "registration.json"

__all__ = ["REGISTER", "REGISTRATION", "RegistryAwayError", "register_model", "registration_config"]


def registration_config(
    register: RegisterConfig, model_name: str, recipe_name: str, experiment: str, store: Store, run_id: str | None
) -> RegistrationConfig:
    """The step's config from the recipe's sections and the resolved store."""
    return RegistrationConfig(
        model_name=model_name,
        recipe_name=recipe_name,
        auto_promote=register.auto_promote,
        gate=register.gate,
        registry=store.configured,
        experiment=experiment,
        tracking_uri=store.uri,
        artifact_root=store.artifact_root,
        run_id=run_id,
    )


def register_model(config: RegistrationConfig, submission: Submission) -> dict[str, Any]:
    """Register a model folder: upload, version, tags, `candidate`, the gate, and `champion` for a version that passed.

    The gate is always evaluated; only where it decides (`auto_promote`) are the version's files loaded again.

    Returns:
        name, version, registry_uri, content_hash, run_id, score, aliases (of this version), promoted, reason,
        champion_before (version, scores, mean over the retrieval sets, evaluation_hash; null where there was none),
        gate (passed, champion, checks).

    Raises:
        RegistryAwayError: the registry does not answer.
        UserError: there is no such folder.
    """
    client = open_registry(config.tracking_uri)
    with answering(config.tracking_uri):
        return _register(client, config, submission)


def _register(client: Any, config: RegistrationConfig, submission: Submission) -> dict[str, Any]:
    name = config.model_name
    version = add_version(client, config, submission)
    number = str(version.version)
    current = tags.aliases(client, name).get(tags.CHAMPION)
    before = champion_facts(client, name, champion_before(read_history(client, name), number, current))
    if before is not None:
        before["mean"] = retrieval_interval(client, config.tracking_uri, name, before["version"])
    result = evaluate_gate(client, config.tracking_uri, name, number, config.gate, probes=config.auto_promote)
    promoted, reason = False, "auto_promote is off"
    if current == number:
        promoted, reason = True, f"version {number} is champion"
    elif config.auto_promote:
        try:
            promote_candidate(client, result)
            compared = next(check.message for check in result.checks if check.name == "comparison")
            promoted, reason = True, compared if result.champion else "there was no champion"
        except PromotionRefusedError as refused:
            reason = str(refused)
    return {
        "name": name,
        "version": number,
        "registry_uri": f"models:/{name}/{number}",
        "content_hash": version.tags[tags.CONTENT],
        "run_id": version.run_id,
        "score": float(version.tags[tags.SCORE]),
        "aliases": sorted(alias for alias, at in tags.aliases(client, name).items() if at == number),
        "promoted": promoted,
        "reason": reason,
        "champion_before": before,
        "gate": result.as_json(),
    }


def _build(config: RegistrationConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    model, scores = inputs["model"], inputs["scores"]
    submission = Submission(
        folder=str(storage.local_path(model.path(chains.MODEL_FOLDER))),
        scores=json.loads(storage.read_bytes(scores.path(SCORES))),
        items=storage.read_bytes(scores.path(ITEMS)),
        provenance=chains.trace(model, scores),
        tags={
            "manifest_hash": model.manifest_hash,
            "evaluation_manifest_hash": scores.manifest_hash,
            "git_revision": git_revision() or "unknown",
        },
    )
    registration = register_model(config, submission)
    storage.write_json(storage.join(work_uri, REGISTRATION), registration)
    done = {"score": registration["score"], "promoted": registration["promoted"], "registry": config.registry}
    return StepResult(metrics=done)


REGISTER = Step("register", 2, _build)
