"""Files at any fsspec URI, and the publication of pipeline steps (layer 0).

A pipeline step turns a config and input artifacts into a directory. `manifest.json` is written last: only it makes the
artifact exist. A step whose manifest carries the expected fingerprint is skipped; one with another fingerprint is
refused with the difference; what has no manifest is never read as a result.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from nvembed.changes import differences
from nvembed.formats import check_format, stamp, with_defaults
from nvembed.retry import RetriedFile, placed, retried
from nvembed.revision import git_revision
from nvembed.types import Artifact, Config, UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STARTED = ".step.json"  # written when a step starts; lets a changed recipe be refused before anything is published
WORKING = ("checkpoints", STARTED, ".tmp")  # never part of an artifact
FORMAT_VERSION = 1
_CHUNK = 1 << 20


class CorruptArtifactError(UserError):
    """A file of an artifact is missing, truncated, or does not have the checksum its manifest states."""


class ChangedRecipeError(UserError):
    """The output belongs to another recipe than the one given now."""


# -- files ----------------------------------------------------------------------------------------------------------


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a URI and the path inside it."""
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, path


def is_local(uri: str) -> bool:
    """True when the URI is on this machine's file system."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def local_path(uri: str) -> Path:
    """The local path of a URI.

    Raises:
        UserError: the URI is not on this machine's file system.
    """
    if not is_local(uri):
        raise UserError(f"{uri}: this needs a local path; mount the storage or copy the folder first")
    return Path(filesystem(uri)[1])


def absolute(uri: str) -> str:
    """The URI with a local relative path made absolute, no trailing slash."""
    return os.path.abspath(filesystem(uri)[1]) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """Child of a URI."""
    return "/".join((uri.rstrip("/"), *parts))


@retried
def exists(uri: str) -> bool:
    """Whether something is at the URI."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


@retried
def make_directory(uri: str) -> None:
    """Create a directory and its parents."""
    fs, path = filesystem(uri)
    fs.makedirs(path, exist_ok=True)


@retried
def remove(uri: str) -> None:
    """Delete a file or a tree that this run made; nothing happens if it is not there."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


@retried
def list_directory(uri: str) -> list[str]:
    """Names directly under a URI, sorted; empty if it does not exist."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    if not fs.exists(path):
        return []
    return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))


@retried
def read_bytes(uri: str) -> bytes:
    """Contents of a file."""
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        data: bytes = file.read()
    return data


@retried
def size(uri: str) -> int:
    """Bytes of a file."""
    fs, path = filesystem(uri)
    return int(fs.size(path))


@retried
def open_reader(uri: str) -> io.BufferedReader:
    """A file to read, seekable; from a remote store a read that fails for a while is repeated."""
    fs, path = filesystem(uri)
    file = fs.open(path, "rb")
    return io.BufferedReader(file if isinstance(fs, LocalFileSystem) else RetriedFile(file), _CHUNK)


@contextmanager
def open_writer(uri: str) -> Iterator[IO[bytes]]:
    """A file to write at any URI, its folder made. Not atomic: for what a manifest or a later pass vouches for."""
    fs, path = filesystem(uri)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with placed(uri), fs.open(path, "wb") as file:
        yield file


@retried
def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically: readers see the old contents or the new, never a part (local: temp file + rename)."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):  # object stores publish a whole object on close
        with fs.open(path, "wb") as file:
            file.write(data)
        return
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with placed(uri), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(uri: str) -> Any:
    """Parsed JSON of a file."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Write JSON atomically, keys sorted, indented."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


@retried
def checksum(uri: str) -> str:
    """xxh3-128 of a file's bytes, as hex: finds corruption; it is not a defence against an attacker."""
    digest = xxhash.xxh3_128()
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


@retried
def describe_files(uri: str) -> dict[str, dict[str, Any]]:
    """`{relative path: {size, xxh3_128}}` of everything under a directory but working files and the manifest."""
    fs, root = filesystem(uri)
    fs.invalidate_cache()
    prefix = root.rstrip("/") + "/"
    found = {}
    for path in sorted(fs.find(root)):
        relative = str(path)[len(prefix) :]
        if relative == MANIFEST or relative.split("/", 1)[0] in WORKING or relative.endswith(".tmp"):
            continue
        full = join(uri, relative)
        found[relative] = {"size": int(fs.size(path)), "xxh3_128": checksum(full)}
    return found


@retried
def verify_files(uri: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check sizes and checksums of a directory's files.

    Raises:
        CorruptArtifactError: naming every file that is missing or differs.
    """
    problems = []
    for name, expected in files.items():
        full = join(uri, name)
        fs, path = filesystem(full)
        if not fs.exists(path):
            problems.append(f"{name}: missing")
        elif (size := int(fs.size(path))) != expected["size"]:
            problems.append(f"{name}: {size} bytes, expected {expected['size']}")
        elif checksum(full) != expected["xxh3_128"]:
            problems.append(f"{name}: checksum differs")
    if problems:
        listed = "; ".join(problems)
        raise CorruptArtifactError(f"{uri} is corrupt: {listed}. Move the directory away and run again to rebuild it.")


# -- artifacts ------------------------------------------------------------------------------------------------------


def load_artifact(uri: str, *, verify: bool = True) -> Artifact:
    """Open a published artifact.

    Raises:
        CorruptArtifactError: no manifest, an unreadable one, or (with `verify`) files that do not match it.
        FormatError: a format this nvembed does not read.
    """
    uri = absolute(uri)
    manifest_uri = join(uri, MANIFEST)
    if not exists(manifest_uri):
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
        found = read_json(uri)
    except ValueError as error:
        raise CorruptArtifactError(f"{uri} cannot be read ({error}). Move the directory away.") from error
    if not isinstance(found, dict):
        raise CorruptArtifactError(f"{uri} is not a JSON object. Move the directory away.")
    return found


@dataclass
class StepResult:
    """What a step tells beyond its files."""

    rows: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A named kind of pipeline step.

    Attributes:
        kind: what it does ("mine"); a road may hold several steps of one kind under different names.
        logic_version: bumped when the meaning of the result changes; part of the fingerprint.
        build: `build(config, inputs, work_uri) -> StepResult`, writes its files under `work_uri`, which is the final
            directory: until the manifest is there, nobody reads it. Must cope with what a killed run left behind.
        cleared: True to empty the directory before building (steps without resumable working files).
    """

    kind: str
    logic_version: int
    build: Callable[[Any, Mapping[str, Artifact], str], StepResult]
    cleared: bool = True

    def fingerprint(self, config: Config, inputs: Mapping[str, Artifact]) -> str:
        """Hash of everything that decides the result."""
        return hash_json(self._identity(config, inputs))

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
        uri = absolute(uri)
        identity = self._identity(config, inputs)
        for name in (MANIFEST, STARTED):
            if exists(join(uri, name)):
                found = with_defaults(_read_record(join(uri, name)), type(config))
                _refuse_other_identity(found, identity, uri)
        return load_artifact(uri) if exists(join(uri, MANIFEST)) else None

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
        uri = absolute(uri)
        published = self.find(config, inputs, uri)
        if published is not None:
            remove_working_files(uri)
            return published
        identity = self._identity(config, inputs)
        _prepare_directory(uri, clear=self.cleared)
        write_json(join(uri, STARTED), identity)
        started = time.time()
        result = self.build(config, inputs, uri)
        files = describe_files(uri)
        manifest = {
            **stamp(FORMAT_VERSION),
            **identity,
            "fingerprint": self.fingerprint(config, inputs),
            "content_hash": hash_json({"fingerprint": self.fingerprint(config, inputs), "files": files}),
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
        write_json(join(uri, MANIFEST), manifest)
        remove_working_files(uri)
        return Artifact(uri, manifest)


def remove_working_files(uri: str) -> None:
    """Delete what a published step no longer needs (also what a run killed right after publication left)."""
    for name in WORKING:
        remove(join(uri, name))


def _prepare_directory(uri: str, *, clear: bool) -> None:
    """Make a step's directory, or take over what a killed run of ours left; refuse one that no run of ours started.

    The start file goes last: killed half-way through, the rest is still known to be ours.
    """
    names = list_directory(uri)
    if names and STARTED not in names:
        raise UserError(f"{uri} holds files this run did not make ({', '.join(names[:5])}). Choose another --out.")
    if clear:
        for name in sorted(names, key=lambda name: name == STARTED):
            remove(join(uri, name))
    make_directory(uri)


def _refuse_other_identity(found: Mapping[str, Any], expected: Mapping[str, Any], uri: str) -> None:
    changes = differences({key: found.get(key) for key in expected}, expected)
    if changes:
        listed = "\n  ".join(changes)
        raise ChangedRecipeError(
            f"{uri} was made with another recipe:\n  {listed}\n"
            "Use another --out, restore the recipe, or move the directory away."
        )
