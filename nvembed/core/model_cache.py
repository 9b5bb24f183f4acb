"""The model cache: remote model folders and hub snapshots, fetched once per node to its own disk.

Ranks and actors of a node request the same model at the same time. The first that gets the entry's kernel lock fetches
the model; the others wait and use its copy. The kernel releases the lock of a killed process, so no other is blocked:
the next one removes the partial copy and fetches again. A folder gets its name only when it is complete.

Weights are safetensors: pickled ones are never fetched. The cache is `$NVEMBED_CACHE`, or `~/.cache/nvembed`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nvembed.core import storage
from nvembed.core.secrets import mask, without_credentials
from nvembed.types import UserError

logger = logging.getLogger(__name__)

NEVER = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".joblib", ".npy")  # pickles, mostly
# of a hub repository only what transformers and sentence-transformers read from a folder; the rest are other formats
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
OTHER_FORMATS = (
    "onnx/*",
    "openvino/*",
    "original/*",
    "consolidated*",
    "*.gguf",
    "coreml/*",
    "tf_model*",
    "flax_model*",
)
FRESH_SECONDS = 600.0  # how long a hub name without a revision is resolved once, so that all ranks of a start agree


def cache_root() -> Path:
    """Directory of the fetched models on this node."""
    return Path(os.environ.get("NVEMBED_CACHE") or Path.home() / ".cache" / "nvembed") / "models"


def local_model(name: str, revision: str | None = None) -> Path:
    """A model's folder on this node: a local folder itself; a URI or hub name is fetched once per node.

    Args:
        name: folder, fsspec URI of a folder, or hub name.
        revision: of a hub name; a commit is fetched once for good.

    Raises:
        UserError: it does not exist, cannot be reached, or has no files.
    """
    if "://" in name and not storage.is_local(name):
        return _remote(name)
    if "://" in name or os.path.isabs(name) or os.path.isdir(name):
        return Path(storage.absolute(name))
    return _hub(name, revision)


@contextlib.contextmanager
def written_folder(uri: str) -> Iterator[Path]:
    """A local folder to write: the one at `uri`, or a temporary one that is uploaded to a remote `uri` afterwards.

    A partial upload of a killed run is removed first.
    """
    if storage.is_local(uri):
        yield storage.local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="nvembed-folder-") as temporary:
        folder = Path(temporary, "folder")
        yield folder
        storage.remove(uri)
        fs, root = storage.filesystem(uri)
        for path in sorted(folder.rglob("*")):
            if path.is_file():  # one by one: stores differ in a recursive put to an existing target
                fs.put_file(str(path), f"{root}/{path.relative_to(folder).as_posix()}")


def _remote(uri: str) -> Path:
    shown = mask(uri)
    try:
        fs, _ = storage.filesystem(uri)
        files = {
            relative: (path, str(fs.checksum(path)))
            for relative, path in storage.files_below(uri).items()
            if not relative.endswith(NEVER)
        }
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{shown} cannot be read ({type(error).__name__}: {error}).") from error
    if not files:
        raise UserError(f"{shown}: no model folder (it is empty or missing)")
    stamps = {relative: stamp for relative, (_, stamp) in files.items()}
    key = storage.hash_json([without_credentials(uri), stamps])[:32]
    target = cache_root() / key
    if target.is_dir():
        return target
    with _locked(key):
        if target.is_dir():
            return target
        part = cache_root() / f"{key}.part"  # written under the lock only: an existing one is of a killed process
        shutil.rmtree(part, ignore_errors=True)
        started = time.monotonic()
        try:
            for relative, (path, _) in files.items():
                (part / relative).parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(path, str(part / relative))
        except OSError as error:
            raise UserError(f"{shown} cannot be fetched ({type(error).__name__}: {error}).") from error
        os.replace(part, target)
        logger.info("%s: fetched in %.1f s", shown, time.monotonic() - started)
    return target


def _hub(name: str, revision: str | None) -> Path:
    key = storage.hash_json([os.environ.get("HF_ENDPOINT", ""), os.environ.get("HF_HOME", ""), name, revision])[:32]
    marker = cache_root() / f"{key}.json"
    folder = _known(marker, revision)
    if folder is not None:
        return folder
    with _locked(key):
        folder = _known(marker, revision)  # the previous holder of the lock may have fetched it
        if folder is not None:
            return folder
        folder = _snapshot(name, revision)
        storage.write_json(str(marker), {"name": name, "revision": revision, "folder": str(folder)})
    return folder


def _known(marker: Path, revision: str | None) -> Path | None:
    """The folder of an earlier, complete fetch; that of a name without a commit counts for `FRESH_SECONDS`."""
    try:
        fixed = revision is not None and len(revision) == 40
        if not fixed and time.time() - marker.stat().st_mtime > FRESH_SECONDS:
            return None
        folder = Path(json.loads(marker.read_bytes())["folder"])
    except (OSError, ValueError, KeyError):
        return None
    return folder if folder.is_dir() else None


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted, others = list(WANTED), [*OTHER_FORMATS, *(f"*{ending}" for ending in NEVER)]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=others))
    except (OSError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{name!r} is no folder here and cannot be fetched from the hub ({type(error).__name__}: {first}). Check "
            "name, revision and connection; a gated model needs HF_TOKEN."
        ) from error


@contextlib.contextmanager
def _locked(key: str) -> Iterator[None]:
    """The node's lock of an entry: a kernel lock, released when its holder ends for any reason."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / f"{key}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
