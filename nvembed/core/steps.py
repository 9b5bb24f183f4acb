"""Pipeline steps and the publication of their results.

A pipeline step turns a config and input artifacts into a directory. `manifest.json` is written last: only it makes the
artifact exist. A step whose manifest carries the expected fingerprint is skipped; one with another fingerprint is
refused with the difference; what has no manifest is never read as a result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nvembed.core import storage
from nvembed.core.formats import check_format, stamp, with_defaults
from nvembed.core.retry import retried
from nvembed.core.runtime import git_revision
from nvembed.types import Artifact, Config, UserError

MANIFEST = "manifest.json"
STARTED = ".step.json"  # written when a step starts; lets a changed recipe be refused before anything is published
WORKING = ("checkpoints", STARTED, ".tmp")  # never part of an artifact
FORMAT_VERSION = 1

# files that more than one package names; of a run:
RECIPE, RECORDS = "recipe.yaml", "steps.json"
REPORT_JSON, REPORT_HTML = "report.json", "report.html"
MLFLOW_DB, MLFLOW_ARTIFACTS = "mlflow.db", "mlartifacts"  # MLflow's store, where no server is given
# of a step:
METRICS, STARTS = "metrics.jsonl", "starts.jsonl"
AUDIT, SCORES, ITEMS, COMPARISON = "audit.json", "scores.json", "items.parquet", "comparison.json"
OBJECTIVE = "objective.safetensors"  # parameters of a trained objective
# of a model folder:
DESCRIPTION = "nvembed.json"  # only with it is the folder ours
PROBES_JSON, PROBES_TENSORS = "probes.json", "probes.safetensors"


class CorruptArtifactError(UserError):
    """A file of an artifact is missing, truncated, or does not have the checksum its manifest states."""


class ChangedRecipeError(UserError):
    """The output belongs to another recipe than the one given now."""


@retried
def describe_files(uri: str) -> dict[str, dict[str, Any]]:
    """`{relative path: {size, xxh3_128}}` of everything under a directory but working files and the manifest."""
    fs, _ = storage.filesystem(uri)
    files = {}
    for relative, path in storage.files_below(uri).items():
        if relative == MANIFEST or relative.split("/", 1)[0] in WORKING or relative.endswith(".tmp"):
            continue
        full = storage.join(uri, relative)
        files[relative] = {"size": int(fs.size(path)), "xxh3_128": storage.checksum(full)}
    return files


@retried
def verify_files(uri: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check sizes and checksums of a directory's files.

    Raises:
        CorruptArtifactError: naming every file that is missing or differs.
    """
    problems = []
    for name, expected in files.items():
        full = storage.join(uri, name)
        fs, path = storage.filesystem(full)
        if not fs.exists(path):
            problems.append(f"{name}: missing")
        elif (size := int(fs.size(path))) != expected["size"]:
            problems.append(f"{name}: {size} bytes, expected {expected['size']}")
        elif storage.checksum(full) != expected["xxh3_128"]:
            problems.append(f"{name}: checksum differs")
    if problems:
        listed = "; ".join(problems)
        raise CorruptArtifactError(f"{uri} is corrupt: {listed}. Move the directory away and run again to rebuild it.")


def load_artifact(uri: str, *, verify: bool = True) -> Artifact:
    """Open a published artifact.

    Raises:
        CorruptArtifactError: no manifest, an unreadable one, or (with `verify`) files that do not match it.
        FormatError: a format this nvembed does not read.
    """
    uri = storage.absolute(uri)
    manifest_uri = storage.join(uri, MANIFEST)
    if not storage.exists(manifest_uri):
        raise CorruptArtifactError(f"{uri} has no {MANIFEST}: it is not a published artifact. Run its step first.")
    manifest = _read_record(manifest_uri)
    check_format(manifest, manifest_uri, newest=FORMAT_VERSION)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CorruptArtifactError(f"{manifest_uri} lists no files. Move the directory away.")
    if verify:
        verify_files(uri, files)
    return Artifact(uri, manifest)


def _read_record(uri: str) -> dict[str, Any]:
    """A manifest or start file; anything but a JSON object is corruption."""
    try:
        record = storage.read_json(uri)
    except ValueError as error:
        raise CorruptArtifactError(f"{uri} cannot be read ({error}). Move the directory away.") from error
    if not isinstance(record, dict):
        raise CorruptArtifactError(f"{uri} is not a JSON object. Move the directory away.")
    return record


@dataclass
class StepResult:
    """Row counts and metrics that a step records in its manifest."""

    rows: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A named kind of pipeline step.

    Attributes:
        kind: what it does ("mine"); a pipeline may have several steps of one kind under different names.
        logic_version: bumped when the meaning of the result changes; part of the fingerprint.
        build: `build(config, inputs, work_uri) -> StepResult`, writes its files under `work_uri`, which is the final
            directory: without a manifest it is not read. Must cope with what a killed run left behind.
        cleared: True to empty the directory before building (steps without resumable working files).
    """

    kind: str
    logic_version: int
    build: Callable[[Any, Mapping[str, Artifact], str], StepResult]
    cleared: bool = True

    def fingerprint(self, config: Config, inputs: Mapping[str, Artifact]) -> str:
        """Hash of everything that decides the result."""
        return storage.hash_json(self._identity(config, inputs))

    def _identity(self, config: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "logic_version": self.logic_version,
            "config": config.model_dump(mode="json"),
            "inputs": {name: artifact.manifest_hash for name, artifact in sorted(inputs.items())},
        }

    def find(self, config: Config, inputs: Mapping[str, Artifact], uri: str) -> Artifact | None:
        """The artifact already published at `uri` for exactly this identity, verified; None if none was published.

        Raises:
            ChangedRecipeError: `uri` holds, or was started as, something else.
            CorruptArtifactError: it was published and is damaged.
        """
        uri = storage.absolute(uri)
        identity = self._identity(config, inputs)
        for name in (MANIFEST, STARTED):
            if storage.exists(storage.join(uri, name)):
                stored = with_defaults(_read_record(storage.join(uri, name)), type(config))
                _refuse_other_identity(stored, identity, uri)
        return load_artifact(uri) if storage.exists(storage.join(uri, MANIFEST)) else None

    def run(
        self,
        config: Config,
        inputs: Mapping[str, Artifact],
        uri: str,
        *,
        fence: int = 0,
        guard: Callable[[], None] | None = None,
    ) -> Artifact:
        """Return the published artifact, building it first when it does not exist yet.

        Args:
            fence: fencing number of the lease under which this runs; recorded.
            guard: called right before publication; raises when the output was taken over by another run.
        """
        uri = storage.absolute(uri)
        published = self.find(config, inputs, uri)
        if published is not None:
            remove_working_files(uri)
            return published
        identity = self._identity(config, inputs)
        _prepare_directory(uri, clear=self.cleared)
        storage.write_json(storage.join(uri, STARTED), identity)
        started = time.time()
        result = self.build(config, inputs, uri)
        files = describe_files(uri)
        manifest = {
            **stamp(FORMAT_VERSION),
            **identity,
            "fingerprint": self.fingerprint(config, inputs),
            "content_hash": storage.hash_json({"fingerprint": self.fingerprint(config, inputs), "files": files}),
            "input_uris": {name: artifact.uri for name, artifact in sorted(inputs.items())},
            "files": files,
            "rows": result.rows,
            "metrics": result.metrics,
            "timing": {"started": started, "seconds": time.time() - started},
            "git_revision": git_revision(),
            "fence": fence,
        }
        if guard is not None:
            guard()
        storage.write_json(storage.join(uri, MANIFEST), manifest)
        remove_working_files(uri)
        # as a resumed run reads it: JSON sorts the keys and knows no tuples, and a later step must not see a difference
        return load_artifact(uri, verify=False)


def remove_working_files(uri: str) -> None:
    """Delete the working files of a published step, also those of a run killed right after publication."""
    for name in WORKING:
        storage.remove(storage.join(uri, name))


def _prepare_directory(uri: str, *, clear: bool) -> None:
    """Make a step's directory, or take over that of a killed run; refuse one that no run started.

    The start file goes last: killed half-way through, the directory is still known to be a run's.
    """
    names = storage.list_directory(uri)
    if names and STARTED not in names:
        raise UserError(f"{uri} holds files this run did not make ({', '.join(names[:5])}). Choose another --out.")
    if clear:
        for name in sorted(names, key=lambda name: name == STARTED):
            storage.remove(storage.join(uri, name))
    storage.make_directory(uri)


def _refuse_other_identity(stored: Mapping[str, Any], expected: Mapping[str, Any], uri: str) -> None:
    changes = differences({key: stored.get(key) for key in expected}, expected)
    if changes:
        listed = "\n  ".join(changes)
        raise ChangedRecipeError(
            f"{uri} was made with another recipe:\n  {listed}\n"
            "Use another --out, restore the recipe, or move the directory away."
        )


ABSENT = object()  # the value of a key that only the other one has


def changed_values(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(path, old, new) of every leaf in which two JSON values differ, in the order of the keys."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from changed_values(old.get(key, ABSENT), new.get(key, ABSENT), (*path, str(key)))
    elif _shown(old) != _shown(new):  # as text: in JSON 1, 1.0 and true are not the same
        yield path, old, new


def differences(old: Any, new: Any) -> list[str]:
    """Lines `path: old -> new` for every leaf in which two JSON values differ; a key that is not there is `(none)`."""
    changes = sorted(changed_values(old, new), key=lambda change: change[0])
    return [f"{'.'.join(path)}: {_shown(before)} -> {_shown(after)}" for path, before, after in changes]


def _shown(value: Any) -> str:
    return "(none)" if value is ABSENT else json.dumps(value, default=str, sort_keys=True, ensure_ascii=False)
