"""From the artifacts of a run to the `Report`: reads what the steps wrote, computes nothing but comparisons."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nvembed.core import storage
from nvembed.core.secrets import mask_all
from nvembed.registry.step import REGISTRATION
from nvembed.registry.versions import primary_metric
from nvembed.report.comparisons import RETRIEVAL_METRIC, Scored, compare_systems, retrieval_means
from nvembed.report.environment import describe_environment
from nvembed.report.schema import (
    Champion,
    Dataset,
    Environment,
    Input,
    Interval,
    LineageEntry,
    Model,
    Report,
    Restart,
    Share,
    StepRecord,
    Table,
    Training,
)
from nvembed.report.sizes import model_sizes
from nvembed.report.training_data import data_mixes, negatives_quality
from nvembed.tracking.tracker import METRICS
from nvembed.types import Artifact

logger = logging.getLogger(__name__)

STARTS = "starts.jsonl"  # beside the metrics, see training/loop.py, which needs torch
BASELINES = ("bm25", "minilm", "untrained")
TEACHERS = ("train_stage_2", "train_stage_1", "teacher")  # the first of these that a run has is its teacher
METRIC_ORDER = ("ndcg_at_10", "recall_at_100", "mrr_at_10", "accuracy", "v_measure", "spearman")
CHAMPION = "champion_"  # before a role's name: who was the registry's champion before this run
READING_ORDER = (*BASELINES, CHAMPION + "teacher", "teacher", "student_before", CHAMPION + "student", "student")
# step that scored, and what its system "model" is called in the report
SCORED = {"evaluate_teacher": "teacher", "evaluate_student_init": "student_before", "evaluate_student": "student"}


def collect_report(
    recipe_name: str,
    recipe: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    artifacts: Mapping[str, Artifact],
    wall_seconds: float,
    peak_pss_mb: float | None,
    environment: Environment | None = None,
) -> Report:
    """Everything `report.json` says; parts whose steps are missing are left empty.

    Args:
        recipe_name: the recipe's name.
        recipe: the resolved recipe.
        records: name, status, seconds, peak_pss_mb, artifact (URI) of every step so far, in order.
        artifacts: artifact by step name.
        wall_seconds: of this run.
        peak_pss_mb: of this run.
        environment: what the run ran on; None: this process.
    """
    systems = scored_systems(artifacts)
    files = {scored.artifact.uri: storage.read_json(scored.artifact.path("scores.json")) for scored in systems.values()}
    tables = {
        name: {
            dataset: _in_order(metrics)
            for dataset, metrics in files[scored.artifact.uri]["scores"][scored.system].items()
        }
        for name, scored in systems.items()
    }
    settings = recipe.get("evaluate") or (recipe.get("student") or {}).get("evaluate") or {}
    registrations = _registrations(artifacts)
    models = dict(_models(artifacts))
    student, mining = _read(artifacts, "compare_student", "comparison.json"), _mining(artifacts)
    return Report(
        recipe=recipe_name,
        steps=[StepRecord(**{key: record.get(key) for key in StepRecord.model_fields}) for record in records],
        baselines={name: tables[name] for name in BASELINES if name in tables},
        scores={name: table for name, table in tables.items() if _reported(name)},
        models=models,
        wall_seconds=wall_seconds,
        peak_pss_mb=peak_pss_mb,
        other_scores={name: table for name, table in tables.items() if name not in BASELINES and not _reported(name)},
        comparisons=compare_systems(systems, settings),
        shares=_shares(tables),
        notes={key: text for file in files.values() for key, text in file.get("notes", {}).items()},
        untrained_variants=_untrained_variants(files.values()),
        registrations=registrations,
        student=student,
        datasets=_datasets(artifacts),
        mining=mining,
        training={name: _training(artifact) for name, artifact in _trainings(artifacts)},
        lineage={name: _lineage(artifact) for name, artifact in artifacts.items()},
        environment=environment or describe_environment(),
        resolved_recipe=mask_all(recipe),  # reports are passed around
        mixes=data_mixes(artifacts),
        negatives=negatives_quality(mining),
        means=retrieval_means(systems, settings),
        champions=dict(_champions(registrations, artifacts)),
        sizes=model_sizes(artifacts, {role: model.folder for role, model in models.items()}, student, recipe),
    )


def _registrations(artifacts: Mapping[str, Artifact]) -> dict[str, dict[str, Any]]:
    return {
        name: storage.read_json(artifact.path(REGISTRATION))
        for name, artifact in artifacts.items()
        if REGISTRATION in artifact.manifest["files"]
    }


def _untrained_variants(files: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    return next((file["untrained_variants"] for file in files if "untrained_variants" in file), None)


def _champions(
    registrations: Mapping[str, Mapping[str, Any]], artifacts: Mapping[str, Artifact]
) -> Iterator[tuple[str, Champion]]:
    """By role: who was champion before this run registered its model; nobody where there was none."""
    for step, registration in registrations.items():
        before, role = registration.get("champion_before"), step.removeprefix("register_")
        if before and f"evaluate_{role}" in artifacts:
            ours = storage.read_json(artifacts[f"evaluate_{role}"].path("scores.json"))["evaluation_hash"]
            theirs, scores = before.get("evaluation_hash") or {}, (before.get("scores") or {}).get("model", {})
            yield (
                role,
                Champion(
                    version=str(before["version"]),
                    scores={dataset: _in_order(metrics) for dataset, metrics in scores.items() if metrics},
                    mean=Interval(**before["mean"]) if before.get("mean") else None,
                    other_sets=[dataset for dataset in scores if theirs.get(dataset) != ours.get(dataset)],
                ),
            )


def in_reading_order(tables: Mapping[str, Table]) -> dict[str, Table]:
    """Baselines, champions, teacher, student before, student, each at full width first."""
    order = [name for role in READING_ORDER for name in tables if name.partition("@")[0] == role]
    return {name: tables[name] for name in dict.fromkeys([*order, *tables])}


def _reported(name: str) -> bool:
    return name in ("teacher", "student") or name.startswith("student@")


def scored_systems(artifacts: Mapping[str, Artifact]) -> dict[str, Scored]:
    """Of every step with scores that the run has: name in the report -> where."""
    found = {}
    for step in ("baselines", *SCORED):
        if step in artifacts:
            artifact, role = artifacts[step], SCORED.get(step)
            for name in storage.read_json(artifact.path("scores.json"))["scores"]:
                found[name if role is None else role + name.removeprefix("model")] = Scored(artifact, name)
    return found


def _in_order(metrics: Mapping[str, Any]) -> dict[str, Interval]:
    first = primary_metric(metrics)
    known = [name for name in METRIC_ORDER if name in metrics]
    found = {}
    for name in dict.fromkeys([first, *known, *metrics]):
        values = {key: metrics[name][key] for key in ("value", "low", "high")}
        if all(map(_finite, values.values())):
            found[name] = Interval(**values)
        else:
            logger.warning("report: %s is left out: %s", name, values)
    return found


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def mean_retrieval(table: Table) -> float | None:
    """Mean primary score over the retrieval sets of a system; None where it has none."""
    values = [metrics[RETRIEVAL_METRIC].value for metrics in table.values() if RETRIEVAL_METRIC in metrics]
    return sum(values) / len(values) if values else None


def _shares(tables: Mapping[str, Table]) -> list[Share]:
    teacher = mean_retrieval(tables.get("teacher", {}))
    full = mean_retrieval(tables.get("student", {}))
    if not teacher or not full:
        return []
    shares = []
    for name, table in tables.items():
        value = mean_retrieval(table) if name == "student" or name.startswith("student@") else None
        if value is not None:
            shares.append(Share(system=name, value=value, of_teacher=value / teacher, of_student=value / full))
    return shares


def _models(artifacts: Mapping[str, Artifact]) -> Iterator[tuple[str, Model]]:
    teacher = next((name for name in TEACHERS if name in artifacts), None)
    for role, step in (("teacher", teacher), ("student", "train_student")):
        if step is not None and step in artifacts:
            registration = _read(artifacts, f"register_{role}", REGISTRATION)
            uri = registration["registry_uri"] if registration else None
            yield role, Model(folder=storage.absolute(artifacts[step].path("model")), registry_uri=uri)


def _read(artifacts: Mapping[str, Artifact], step: str, name: str) -> dict[str, Any] | None:
    return dict(storage.read_json(artifacts[step].path(name))) if step in artifacts else None


def _datasets(artifacts: Mapping[str, Artifact]) -> dict[str, Dataset]:
    if "prepare" not in artifacts:
        return {}
    found = artifacts["prepare"].manifest["metrics"]["datasets"]
    known = Dataset.model_fields
    return {
        # report.json says `near_copies_*`: its keys are a contract, so they keep their first name
        name: Dataset(
            **{k: v for key, v in info.items() if (k := key.replace("near_duplicates_", "near_copies_")) in known}
        )
        for name, info in found.items()
    }


def _mining(artifacts: Mapping[str, Artifact]) -> dict[str, Any] | None:
    """The newest audit without its samples: texts stay where the recipe put them."""
    audit = _read(artifacts, "mine_again" if "mine_again" in artifacts else "mine", "audit.json")
    return None if audit is None else {key: value for key, value in audit.items() if key != "samples"}


def _trainings(artifacts: Mapping[str, Artifact]) -> Iterator[tuple[str, Artifact]]:
    return ((name, artifact) for name, artifact in artifacts.items() if METRICS in artifact.manifest["files"])


def read_curve(artifact: Artifact | str) -> list[dict[str, Any]]:
    """The rows of a training step's `metrics.jsonl` (of an artifact, or at a URI)."""
    uri = artifact.path(METRICS) if isinstance(artifact, Artifact) else artifact
    return [json.loads(line) for line in storage.read_bytes(uri).splitlines()]


def gap(row: Mapping[str, Any]) -> float | None:
    """Mean cosine to the positive minus that to the hardest negative, of a row of `metrics.jsonl`."""
    if "hardest_similarity" not in row:
        return None
    return float(row["positive_similarity"] - row["hardest_similarity"])


def _training(artifact: Artifact) -> Training:
    rows = read_curve(artifact)
    starts = read_curve(artifact.path(STARTS)) if STARTS in artifact.manifest["files"] else []
    config = artifact.manifest["config"]
    return Training(
        steps=len(rows),
        first_loss=rows[0]["loss"] if _finite(rows[0]["loss"]) else None,
        last_loss=rows[-1]["loss"] if _finite(rows[-1]["loss"]) else None,
        workers=config.get("num_workers"),
        threads_per_worker=config.get("threads_per_worker"),
        precision=_precision(config),
        metrics=artifact.path(METRICS),
        first_gap=gap(rows[0]),
        last_gap=gap(rows[-1]),
        restarts=[Restart(step=row["step"], time=row["time"], world_size=row.get("world_size")) for row in starts[1:]],
    )


def _precision(config: Mapping[str, Any]) -> str | None:
    configured = config.get("precision")
    if configured is None or config.get("gpus_per_worker"):
        return configured
    from nvembed.modeling.precision import resolve_precision  # torch, which a run of other steps has not loaded

    return resolve_precision(configured, "cpu")


def _lineage(artifact: Artifact) -> LineageEntry:
    manifest = artifact.manifest
    uris = manifest.get("input_uris", {})
    return LineageEntry(
        manifest_hash=artifact.manifest_hash,
        fingerprint=artifact.fingerprint,
        git_revision=manifest.get("git_revision"),
        inputs={name: Input(uri=uris.get(name, ""), manifest_hash=found) for name, found in manifest["inputs"].items()},
    )
