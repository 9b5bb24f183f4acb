"""The local folder of a registered version: in place where its files are on this machine, else fetched and checked."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from nvembed.core import storage
from nvembed.core.model_cache import cache_root
from nvembed.core.steps import MLFLOW_DB, CorruptArtifactError, describe_files
from nvembed.modeling.origin import folder_content
from nvembed.registry import client as tags
from nvembed.registry.client import answering, find_version, open_registry
from nvembed.registry.versions import folder_source, is_here
from nvembed.types import UserError


def hash_folder(folder: str) -> str:
    """Hash of a model folder's file names and checksums, the card included."""
    files = describe_files(folder)
    if not files:
        raise UserError(f"{folder}: no model folder (it is empty or missing)")
    return storage.hash_json({name: entry["xxh3_128"] for name, entry in files.items()})


def registry_uri(uri: str | None, reference: str) -> str:
    """The given registry, or MLFLOW_TRACKING_URI.

    Raises:
        UserError: neither is set.
    """
    address = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not address:
        raise UserError(
            f"{reference}: which registry? Set MLFLOW_TRACKING_URI, for example sqlite:////path/of/the/output/{MLFLOW_DB}"
        )
    return address


def resolve_model(reference: str, tracking_uri: str | None = None, cache: Path | None = None) -> str:
    """The local folder of a model given as a folder, `models:/name@alias` or `models:/name/version`.

    A version whose files lie on this machine is used in place; any other is downloaded once into the cache and
    checked against the content hash it was registered with.

    Args:
        reference: folder or registry URI.
        tracking_uri: the registry; default MLFLOW_TRACKING_URI.
        cache: default `models/` below `$NVEMBED_CACHE` or `~/.cache/nvembed`.

    Raises:
        UserError: no such folder, name, version or alias (with those that exist), or no registry given.
        CorruptArtifactError: the files are not those that were registered.
    """
    if not reference.startswith("models:/"):
        if not Path(reference).is_dir():
            raise UserError(f"{reference}: no such model folder; give a folder or models:/name@alias")
        return str(Path(reference).absolute())
    uri = registry_uri(tracking_uri, reference)
    client = open_registry(uri)
    with answering(uri):
        return fetch_version(client, uri, find_version(client, reference), cache)


def fetch_version(client: Any, uri: str, version: Any, cache: Path | None = None) -> str:
    """The local model folder of a version, its content checked; see `resolve_model`."""
    source = folder_source(client, version)
    reference = f"models:/{version.name}/{version.version}"
    if is_here(source):
        return _checked(str(storage.local_path(source)), version, reference)
    return _download(uri, source, version, reference, cache or cache_root())


def _checked(folder: str, version: Any, reference: str) -> str:
    expected = version.tags.get(tags.CONTENT)
    measure = folder_content if tags.version_format(version) > 1 else hash_folder
    if expected is not None and measure(folder) != expected:
        raise CorruptArtifactError(f"{reference}: the files at {folder} are not those that were registered")
    return folder


def _download(uri: str, source: str, version: Any, reference: str, cache: Path) -> str:
    from mlflow.artifacts import download_artifacts

    target = cache / (version.tags.get(tags.CONTENT) or storage.hash_json([uri, source]))
    if not target.is_dir():
        partial = cache / f"{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        partial.mkdir(parents=True)
        try:
            fetched = download_artifacts(artifact_uri=source, dst_path=str(partial), tracking_uri=uri)
            _checked(fetched, version, reference)
            os.replace(fetched, target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return _checked(str(target), version, reference)
