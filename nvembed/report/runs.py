"""Opens finished runs for a comparison, and collects the report of an output again from its artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any

import yaml
from pydantic import ValidationError

from nvembed.core import storage
from nvembed.core.steps import MANIFEST, RECIPE, REPORT_JSON, load_artifact
from nvembed.report.attempts import RECORDS, read_records
from nvembed.report.collect import collect_report, read_curve
from nvembed.report.schema import Environment, Report
from nvembed.types import Artifact, UserError

LABELS = "ABCDE"  # one for each line style of the charts


@dataclass(frozen=True)
class Run:
    """A finished run."""

    label: str  # A, B, ...: its name beside others
    source: str  # folder or URI of its output
    report: Report
    artifacts: Mapping[str, Artifact]  # those of its steps that still exist unchanged

    @property
    def title(self) -> str:
        """Label and recipe."""
        return f"{self.label} {self.report.recipe}"


def open_runs(sources: Sequence[str]) -> list[Run]:
    """Open outputs of runs, or their `report.json` files, labelled A, B, ... in order.

    Raises:
        UserError: too many runs, the same run twice, or a run without a report.
    """
    if len(sources) > len(LABELS):
        raise UserError(f"{len(sources)} runs are too many for one page; compare at most {len(LABELS)}.")
    runs: list[Run] = []
    for label, source in zip(LABELS, sources, strict=False):
        root, uri = locate(source)
        if not storage.exists(uri):
            raise UserError(
                f"{source} has no {REPORT_JSON}. If it is the output of a run, write its report first: "
                f"nvembed report {source}"
            )
        if root in (run.source for run in runs):
            raise UserError(f"{source} is given twice; name different runs.")
        report = read_report(uri)
        runs.append(Run(label, root, report, dict(_artifacts(root, report))))
    return runs


def locate(source: str) -> tuple[str, str]:
    """Output folder and `report.json`, from either of them.

    Raises:
        UserError: it does not exist.
    """
    uri = storage.absolute(source)
    if not storage.exists(uri):
        raise UserError(f"{source}: there is no such run. Give the output of a run, or its {REPORT_JSON}.")
    fs, path = storage.filesystem(uri)
    if fs.isdir(path):
        return uri, storage.join(uri, REPORT_JSON)
    return uri.rpartition("/")[0], uri


def _artifacts(root: str, report: Report) -> dict[str, Artifact]:
    """Artifacts of the steps: in the output, which can have been moved, else at the URI in the report."""
    artifacts = {}
    for step in report.steps:
        known = report.lineage.get(step.name)
        for uri in (storage.join(root, step.name), step.artifact):
            if known is None or uri is None or not storage.exists(storage.join(uri, MANIFEST)):
                continue
            artifact = load_artifact(uri, verify=False)
            if artifact.manifest_hash == known.manifest_hash:
                artifacts[step.name] = artifact
                break
    return artifacts


def collect_again(root: str) -> Report:
    """The report of an output in its present state, from its recipe, records and published steps.

    The environment is taken from its earlier report, if it has one; else this machine is described.

    Raises:
        UserError: it is not the output of a run, or one of its files is missing.
    """
    recipe, history = _recipe(root), read_records(root)
    if history is None:
        raise UserError(f"{root} has a {RECIPE} but no {RECORDS}: no run was started there.")
    artifacts = {}
    for step in history.steps:
        uri = storage.join(root, step["name"])
        if storage.exists(storage.join(uri, MANIFEST)):
            artifacts[step["name"]] = load_artifact(uri, verify=False)
            step["artifact"] = uri
    order = {name: artifact.manifest["timing"]["started"] for name, artifact in artifacts.items()}
    steps = sorted(history.steps, key=lambda step: order.get(step["name"], float("inf")))  # the file sorts them by name
    artifacts = {step["name"]: artifacts[step["name"]] for step in steps if step["name"] in artifacts}
    earlier = storage.join(root, REPORT_JSON)
    try:
        known = storage.read_json(earlier)["environment"] if storage.exists(earlier) else None
        environment = Environment.model_validate(known) if known is not None else None
        return collect_report(
            recipe["name"], recipe, steps, artifacts, history.wall_seconds, history.peak_mb, environment
        )
    except FileNotFoundError as error:
        missing = error.filename or error
        raise UserError(f"{root}: a published step lacks a file: {missing}. Run its pipeline again.") from error
    except (KeyError, ValidationError, JSONDecodeError) as error:
        raise UserError(
            f"{root}: its steps or its {REPORT_JSON} were not written by this version of nvembed ({error!r}). Use the "
            "version that wrote them, or run its pipeline again into another output."
        ) from error


def _recipe(root: str) -> dict[str, Any]:
    """The resolved recipe of an output."""
    uri = storage.join(root, RECIPE)
    if not storage.exists(uri):
        raise UserError(f"{root} is not the output of a run: it has no {RECIPE}.")
    try:
        recipe = yaml.safe_load(storage.read_bytes(uri))
        return {**recipe, "name": str(recipe["name"])}
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{uri} is not a recipe with a name ({error!r}).") from error


def read_curves(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Rows of `metrics.jsonl` by training step; a step whose file is gone is left out."""
    return {name: read_curve(run.metrics) for name, run in report.training.items() if storage.exists(run.metrics)}


def read_report(uri: str) -> Report:
    """`report.json` of an output, validated.

    Raises:
        UserError: it is not a report that this version reads.
    """
    try:
        return Report.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{uri} is not a report that this nvembed reads ({where}: {first['msg']}). If another version wrote it, "
            f"write it again from the output of its run: nvembed report {uri.rpartition('/')[0]}"
        ) from error
