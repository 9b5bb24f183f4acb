"""Collects the `Report` of a run from its artifacts; only comparisons are computed here."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from nvembed.core import storage
from nvembed.core.runtime import git_revision
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
from nvembed.report.systems import BASELINES, compare_systems, retrieval_means, scored_systems, teacher_shares
from nvembed.report.training_data import data_mixes, negatives_quality
from nvembed.types import Artifact, UserError

logger = logging.getLogger(__name__)

PACKAGES = (
    "nvembed", "torch", "transformers", "peft", "deepspeed", "ray", "datasets", "mlflow", "sentence-transformers",
    "tokenizers", "safetensors", "numpy", "scikit-learn", "pyarrow",
)  # fmt: skip
POOLING = "1_Pooling"  # left out of the untrained backbone, which is scored with plain pooling
TEACHERS = ("train_stage_2", "train_stage_1", "teacher")  # the first of these that a run has is its teacher
METRIC_ORDER = ("ndcg_at_10", "recall_at_100", "mrr_at_10", "accuracy", "v_measure", "spearman")


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
    files = {system.artifact.uri: storage.read_json(system.artifact.path("scores.json")) for system in systems.values()}
    tables = {
        name: {
            dataset: _in_order(metrics)
            for dataset, metrics in files[system.artifact.uri]["scores"][system.name].items()
        }
        for name, system in systems.items()
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
        shares=teacher_shares(tables),
        notes={key: text for file in files.values() for key, text in file.get("notes", {}).items()},
        untrained_variants=_untrained_variants(files.values()),
        registrations=registrations,
        student=student,
        datasets=_datasets(artifacts),
        mining=mining,
        training={name: _training(artifact) for name, artifact in _trainings(artifacts)},
        lineage={name: _lineage(artifact) for name, artifact in artifacts.items()},
        environment=environment or describe_environment(),
        resolved_recipe=mask_all(recipe),  # reports are shared
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
    """By role: the registry's champion before this run registered its model."""
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


def _reported(name: str) -> bool:
    return name in ("teacher", "student") or name.startswith("student@")


def _in_order(metrics: Mapping[str, Any]) -> dict[str, Interval]:
    first = primary_metric(metrics)
    known = [name for name in METRIC_ORDER if name in metrics]
    intervals = {}
    for name in dict.fromkeys([first, *known, *metrics]):
        values = {key: metrics[name][key] for key in ("value", "low", "high")}
        if all(map(_finite, values.values())):
            intervals[name] = Interval(**values)
        else:
            logger.warning("report: %s is left out: %s", name, values)
    return intervals


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


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
    known = Dataset.model_fields
    return {
        # the keys of report.json are a contract: there near duplicates are still `near_copies_*`
        name: Dataset(
            **{k: v for key, v in info.items() if (k := key.replace("near_duplicates_", "near_copies_")) in known}
        )
        for name, info in artifacts["prepare"].manifest["metrics"]["datasets"].items()
    }


def _mining(artifacts: Mapping[str, Artifact]) -> dict[str, Any] | None:
    """The newest audit without its samples: texts are not copied into the report."""
    audit = _read(artifacts, "mine_again" if "mine_again" in artifacts else "mine", AUDIT)
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

    return _resolved(configured)


def _resolved(precision: str) -> str:
    """Precision on this machine's processor."""
    from nvembed.modeling.precision import resolve_precision  # torch, which importing the report must not load

    return resolve_precision(precision, "cpu")


def _lineage(artifact: Artifact) -> LineageEntry:
    manifest = artifact.manifest
    uris = manifest.get("input_uris", {})
    return LineageEntry(
        manifest_hash=artifact.manifest_hash,
        fingerprint=artifact.fingerprint,
        git_revision=manifest.get("git_revision"),
        inputs={
            name: Input(uri=uris.get(name, ""), manifest_hash=content_hash)
            for name, content_hash in manifest["inputs"].items()
        },
    )


# -- sizes of the models ---------------------------------------------------------------------------------------------


def model_sizes(
    artifacts: Mapping[str, Artifact],
    folders: Mapping[str, str],
    comparison: Mapping[str, Any] | None,
    recipe: Mapping[str, Any],
) -> dict[str, Size]:
    """Sizes by system: teacher, student, untrained, minilm; without those whose folder is not on this machine.

    Args:
        artifacts: by step.
        folders: model folder by role.
        comparison: `comparison.json` of the student.
        recipe: resolved; names the reference model.
    """
    models: dict[str, tuple[Path | None, str]] = {role: (_local(folder), "") for role, folder in folders.items()}
    if "initialise" in artifacts:
        models["untrained"] = (_local(artifacts["initialise"].path("model")), POOLING)
    models["minilm"] = (_reference(recipe.get("baselines") or {}), "")
    sizes = {}
    for name, (folder, excluded) in models.items():
        cost = None
        if comparison is not None and name in folders:
            weights = {what: comparison[what][name] for what in ("parameters", "bytes")}
            cost = comparison["encode_cost"].get(name)
        elif folder is not None and any(folder.rglob("*.safetensors")):
            weights = _weights(folder, excluded)
        else:
            continue
        sizes[name] = Size(**weights, dim=_width(folder), encode_seconds=cost)
    return sizes


def _weights(folder: Path, excluded: str) -> dict[str, int]:
    """Parameters and bytes of a model folder without those of a subfolder."""
    from nvembed.modeling.shapes import folder_size

    size, less = folder_size(folder), folder_size(folder / excluded) if excluded else {}
    return {what: number - less.get(what, 0) for what, number in size.items()}


def _local(uri: str) -> Path | None:
    path = storage.local_path(uri) if storage.is_local(uri) else None
    return path if path is not None and path.is_dir() else None


def _width(folder: Path | None) -> int | None:
    """Numbers per embedding: a backbone's hidden size."""
    path = folder / "config.json" if folder is not None else None
    width = json.loads(path.read_bytes()).get("hidden_size") if path is not None and path.is_file() else None
    return width if isinstance(width, int) else None


def _reference(baselines: Mapping[str, Any]) -> Path | None:
    """Folder of the reference model, if it is on this machine."""
    from nvembed.retrieval.encoders import package_folder

    reference = baselines.get("reference") or {}
    if reference.get("type") != "package":
        return _local(reference["name"]) if reference.get("name") else None
    try:
        return package_folder(reference["package"])
    except UserError:
        return None


# -- environment -----------------------------------------------------------------------------------------------------


def describe_environment() -> Environment:
    """Machine and versions of this process: no names of users, hosts or paths."""
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        platform=platform.platform(),
        processor=_processor(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        bf16=_resolved("auto") == "bf16",
        git_revision=git_revision(),
        packages={name: version for name in PACKAGES if (version := _version(name)) is not None},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, from /proc/cpuinfo where there is one."""
    path = Path("/proc/cpuinfo")
    pairs = (line.partition(":") for line in path.read_text(errors="replace").splitlines()) if path.exists() else ()
    names = (value.strip() for key, _, value in pairs if key.strip() == "model name")
    return next(names, "") or platform.processor() or platform.machine()
