"""Collects the `Report` of a run from its artifacts; only comparisons are computed here."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from nvembed.core import storage
from nvembed.core.runtime import git_revision, installed_versions, processor_name
from nvembed.core.secrets import mask_all
from nvembed.core.steps import AUDIT, METRICS, STARTS
from nvembed.registry.step import REGISTRATION
from nvembed.registry.versions import primary_metric
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
    Size,
    StepRecord,
    Training,
)
from nvembed.report.systems import (
    BASELINES,
    ScoredSystem,
    compare_systems,
    retrieval_means,
    scored_systems,
    teacher_shares,
)
from nvembed.report.training_data import data_mixes, negatives_quality
from nvembed.report.words import METRIC_NAMES
from nvembed.types import Artifact, UserError

logger = logging.getLogger(__name__)

PACKAGES = (
    "nvembed", "torch", "transformers", "peft", "deepspeed", "ray", "datasets", "mlflow", "sentence-transformers",
    "tokenizers", "safetensors", "numpy", "scikit-learn", "pyarrow",
)  # fmt: skip
POOLING = "1_Pooling"
TEACHERS = ("train_stage_2", "train_stage_1", "teacher")  # the first of these that a run has is its teacher


def collect_report(
    recipe_name: str,
    recipe: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    artifacts: Mapping[str, Artifact],
    wall_seconds: float,
    peak_pss_mb: float | None,
    environment: Environment | None = None,
) -> Report:
    """The content of `report.json`; parts whose steps are missing are empty.

    Args:
        recipe_name: the recipe's name.
        recipe: the resolved recipe.
        records: name, status, seconds, peak_pss_mb, artifact (URI) of every step so far, in order.
        artifacts: artifact by step name.
        wall_seconds: of this run.
        peak_pss_mb: of this run.
        environment: machine and versions of the run; None: those of this process.
    """
    systems = scored_systems(artifacts)
    tables = {
        name: {dataset: _in_order(metrics) for dataset, metrics in system.file["scores"][system.name].items()}
        for name, system in systems.items()
    }
    reported = [name for name in tables if name in ("teacher", "student") or name.startswith("student@")]
    files = [system.file for system in systems.values()]
    settings = recipe.get("evaluate") or (recipe.get("student") or {}).get("evaluate") or {}
    registrations = {
        step: storage.read_json(artifacts[step].path(REGISTRATION)) for step in _steps_with(REGISTRATION, artifacts)
    }
    models = dict(_models(artifacts, registrations))
    student, audit = _read(artifacts, "compare_student", "comparison.json"), _audit(artifacts)
    return Report(
        recipe=recipe_name,
        steps=[StepRecord(**{key: record.get(key) for key in StepRecord.model_fields}) for record in records],
        baselines={name: tables[name] for name in BASELINES if name in tables},
        scores={name: tables[name] for name in reported},
        models=models,
        wall_seconds=wall_seconds,
        peak_pss_mb=peak_pss_mb,
        other_scores={name: table for name, table in tables.items() if name not in (*BASELINES, *reported)},
        comparisons=compare_systems(systems, settings),
        shares=teacher_shares(tables),
        notes={key: text for file in files for key, text in file.get("notes", {}).items()},
        untrained_variants=next((file["untrained_variants"] for file in files if "untrained_variants" in file), None),
        registrations=registrations,
        student=student,
        datasets=_datasets(artifacts),
        mining=audit,
        training={step: _training(artifacts[step]) for step in _steps_with(METRICS, artifacts)},
        lineage={name: _lineage(artifact) for name, artifact in artifacts.items()},
        environment=environment or describe_environment(),
        resolved_recipe=mask_all(recipe),  # reports are shared
        mixes=data_mixes(artifacts),
        negatives=negatives_quality(audit),
        means=retrieval_means(systems, settings),
        champions=dict(_champions(registrations, systems)),
        sizes=dict(_sizes(artifacts, models, student, recipe)),
    )


def _read(artifacts: Mapping[str, Artifact], step: str, name: str) -> dict[str, Any] | None:
    return dict(storage.read_json(artifacts[step].path(name))) if step in artifacts else None


def _steps_with(file: str, artifacts: Mapping[str, Artifact]) -> list[str]:
    return [step for step, artifact in artifacts.items() if file in artifact.manifest["files"]]


def _audit(artifacts: Mapping[str, Artifact]) -> dict[str, Any] | None:
    """The newest audit of mining without its samples: texts are not copied into the report."""
    audit = _read(artifacts, "mine_again" if "mine_again" in artifacts else "mine", AUDIT)
    return None if audit is None else {key: value for key, value in audit.items() if key != "samples"}


def _models(
    artifacts: Mapping[str, Artifact], registrations: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Model]]:
    teacher = next((name for name in TEACHERS if name in artifacts), "")
    for role, step in (("teacher", teacher), ("student", "train_student")):
        if step in artifacts:
            uri = registrations.get(f"register_{role}", {}).get("registry_uri")
            yield role, Model(folder=storage.absolute(artifacts[step].path("model")), registry_uri=uri)


def _champions(
    registrations: Mapping[str, Mapping[str, Any]], systems: Mapping[str, ScoredSystem]
) -> Iterator[tuple[str, Champion]]:
    """By role: the registry's champion before this run registered its model."""
    for step, registration in registrations.items():
        before, role = registration.get("champion_before"), step.removeprefix("register_")
        if before and role in systems:
            ours, theirs = systems[role].file["evaluation_hash"], before["evaluation_hash"] or {}
            scores = (before["scores"] or {}).get("model", {})
            yield (
                role,
                Champion(
                    version=str(before["version"]),
                    scores={dataset: _in_order(metrics) for dataset, metrics in scores.items() if metrics},
                    mean=before.get("mean"),
                    other_sets=[dataset for dataset in scores if theirs.get(dataset) != ours.get(dataset)],
                ),
            )


def _in_order(metrics: Mapping[str, Any]) -> dict[str, Interval]:
    """The primary metric first, without values that are no numbers."""
    intervals = {}
    for name in dict.fromkeys([primary_metric(metrics), *METRIC_NAMES, *metrics]):
        values = {key: metrics[name][key] for key in ("value", "low", "high")} if name in metrics else None
        if values is not None and all(map(_finite, values.values())):
            intervals[name] = Interval(**values)
        elif values is not None:
            logger.warning("report: %s is left out: %s", name, values)
    return intervals


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _datasets(artifacts: Mapping[str, Artifact]) -> dict[str, Dataset]:
    if "prepare" not in artifacts:
        return {}
    # the keys of report.json are a contract: there near duplicates are still `near_copies_*`
    keys = {key: key.replace("near_copies_", "near_duplicates_") for key in Dataset.model_fields}
    datasets = artifacts["prepare"].manifest["metrics"]["datasets"]
    return {name: Dataset(**{key: info[ours] for key, ours in keys.items()}) for name, info in datasets.items()}


def read_curve(uri: str) -> list[dict[str, Any]]:
    """The rows of a training step's `metrics.jsonl` or `starts.jsonl`."""
    return [json.loads(line) for line in storage.read_bytes(uri).splitlines()]


def gap(row: Mapping[str, Any]) -> float | None:
    """Mean cosine to the positive minus that to the hardest negative, of a row of `metrics.jsonl`."""
    if "hardest_similarity" not in row:
        return None
    return float(row["positive_similarity"] - row["hardest_similarity"])


def _training(artifact: Artifact) -> Training:
    rows = read_curve(artifact.path(METRICS))
    starts = read_curve(artifact.path(STARTS)) if STARTS in artifact.manifest["files"] else []
    config = artifact.manifest["config"]
    return Training(
        steps=len(rows),
        first_loss=rows[0]["loss"] if _finite(rows[0]["loss"]) else None,
        last_loss=rows[-1]["loss"] if _finite(rows[-1]["loss"]) else None,
        workers=config["num_workers"],
        threads_per_worker=config["threads_per_worker"],
        precision=config["precision"] if config.get("gpus_per_worker") else _on_processor(config["precision"]),
        metrics=artifact.path(METRICS),
        first_gap=gap(rows[0]),
        last_gap=gap(rows[-1]),
        restarts=[Restart(**{key: row[key] for key in Restart.model_fields}) for row in starts[1:]],
    )


def _on_processor(precision: str) -> str:
    """A configured precision as this machine's processor resolves it."""
    from nvembed.modeling.precision import resolve_precision  # torch, which importing the report must not load

    return resolve_precision(precision, "cpu")


def _lineage(artifact: Artifact) -> LineageEntry:
    manifest = artifact.manifest
    return LineageEntry(
        manifest_hash=artifact.manifest_hash,
        fingerprint=artifact.fingerprint,
        git_revision=manifest.get("git_revision"),
        inputs={
            name: Input(uri=manifest["input_uris"][name], manifest_hash=content_hash)
            for name, content_hash in manifest["inputs"].items()
        },
    )


# -- sizes of the models ---------------------------------------------------------------------------------------------


def _sizes(
    artifacts: Mapping[str, Artifact],
    models: Mapping[str, Model],
    comparison: Mapping[str, Any] | None,
    recipe: Mapping[str, Any],
) -> Iterator[tuple[str, Size]]:
    """Teacher, student, untrained, minilm; without those whose folder is not on this machine.

    `comparison` is the `comparison.json` of the student; the recipe names the reference model.
    """
    from nvembed.modeling.shapes import folder_size

    uris = {role: model.folder for role, model in models.items()}
    if "initialise" in artifacts:
        uris["untrained"] = artifacts["initialise"].path("model")
    uris["minilm"] = _reference((recipe.get("baselines") or {}).get("reference") or {})
    for name, uri in uris.items():
        path = Path(storage.local_path(uri)) if uri and storage.is_local(uri) else None
        folder, cost = path if path is not None and path.is_dir() else None, None
        if comparison is not None and name in models:
            weights = {what: comparison[what][name] for what in ("parameters", "bytes")}
            cost = comparison["encode_cost"].get(name)
        elif folder is not None and any(folder.rglob("*.safetensors")):
            weights = folder_size(folder)
            if name == "untrained":  # scored with plain pooling
                weights = {what: size - folder_size(folder / POOLING)[what] for what, size in weights.items()}
        else:
            continue
        yield name, Size(**weights, dim=_width(folder), encode_seconds=cost)


def _width(folder: Path | None) -> int | None:
    """Numbers per embedding: a backbone's hidden size."""
    config = folder / "config.json" if folder is not None else None
    return json.loads(config.read_bytes()).get("hidden_size") if config is not None and config.is_file() else None


def _reference(reference: Mapping[str, Any]) -> str:
    """Folder of the reference model; empty if it is not on this machine."""
    from nvembed.retrieval.encoders import package_folder

    if reference.get("type") != "package":
        return str(reference.get("name") or "")
    try:
        return str(package_folder(reference["package"]))
    except UserError:
        return ""


def describe_environment() -> Environment:
    """Machine and versions of this process: no names of users, hosts or paths."""
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        platform=platform.platform(),
        processor=processor_name(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        bf16=_on_processor("auto") == "bf16",
        git_revision=git_revision(),
        packages=installed_versions(PACKAGES),
    )
