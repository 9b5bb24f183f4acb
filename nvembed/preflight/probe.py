"""The probe: an actor that gathers the facts of its node.

The module is sent to the nodes by value and imports the standard library only: it has to work where nvembed is
missing, broken or another version, and say so.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LIBRARIES = ("ray", "torch", "transformers", "deepspeed", "peft", "safetensors", "pyarrow", "fsspec")
HUB_SECONDS = 10.0
CONNECT_SECONDS = 3.0


class Probe:
    """The facts of one node. Methods return plain values; errors are values too."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def look(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """The facts that need no other node.

        Args:
            order: `packages` (names), `models` ({name, revision}), `scratch` (URI below the output), `node` (its id).
        """
        return {
            "host": socket.gethostname(),
            "versions": versions(),
            "source": _or_error(source_hash),
            "packages": {name: _version(name) for name in order["packages"]},
            "models": [{**model, "state": model_state(model["name"], model["revision"])} for model in order["models"]],
            "storage": _or_error(lambda: try_storage(order["scratch"], order["node"])),
            "shared_memory": _free("/dev/shm"),
            "temporary": _free(os.environ.get("RAY_TMPDIR") or "/tmp"),
            "authentication": _or_error(authentication),
        }

    def clock(self) -> float:
        """Seconds since the epoch by this node's clock."""
        return time.time()

    def listen(self) -> tuple[str, int]:
        """Open a port as rank 0 would for the others; its address."""
        import ray

        address = str(ray.util.get_node_ip_address())
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(("", 0))
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        return address, int(listener.getsockname()[1])

    def reach(self, addresses: Mapping[str, tuple[str, int]]) -> dict[str, str]:
        """Node -> error for the listeners that cannot be reached from here."""
        failed: dict[str, str] = {}

        def connect(name: str, address: tuple[str, int]) -> None:
            try:
                with socket.create_connection(address, timeout=CONNECT_SECONDS) as connection:
                    if connection.recv(2) != b"ok":
                        failed[name] = "something else answers"
            except OSError as error:
                failed[name] = str(error)

        threads = [threading.Thread(target=connect, args=item) for item in addresses.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return failed

    def close(self, scratch: str) -> None:
        """Stop listening, and remove the scratch directory."""
        if self._listener is not None:
            self._listener.close()
        with contextlib.suppress(Exception):
            clear(scratch)


def _accept(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"ok")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that decide results or formats; None for a missing one."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_hash() -> str | None:
    """SHA-256 of nvembed's Python files as this process would import them; None where there is no nvembed."""
    spec = importlib.util.find_spec("nvembed")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def model_state(name: str, revision: str | None) -> str:
    """ "ok" where a model can be opened here: a folder or URI that exists, a hub name in the cache or on the hub."""
    if "://" in name or Path(name).is_absolute() or Path(name).is_dir():
        return _or_error(lambda: "ok" if _exists(name) else "not there")
    return _or_error(lambda: _hub(name, revision))


def _exists(uri: str) -> bool:
    import fsspec

    fs, path = fsspec.core.url_to_fs(uri)
    return bool(fs.glob(path)) if "*" in path else bool(fs.exists(path))


def _hub(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return "ok"
    HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
    return "ok"


def try_storage(scratch: str, node: str) -> str:
    """Write, rename, list and read a file, as publication, checkpoints and leases do. "ok" or the failure."""
    import fsspec

    fs, path = fsspec.core.url_to_fs(scratch)
    fs.makedirs(path, exist_ok=True)
    before, after = f"{path}/{node}.part", f"{path}/{node}"
    with fs.open(before, "wb") as file:
        file.write(node.encode())
    fs.mv(before, after)
    fs.invalidate_cache()
    names = {str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)}
    if node not in names or f"{node}.part" in names:
        return f"a renamed file is listed wrongly: {', '.join(sorted(names))}"
    with fs.open(after, "rb") as file:
        return "ok" if file.read() == node.encode() else "what was written cannot be read back"


def listed(scratch: str) -> set[str]:
    """Names that this process sees in the scratch directory."""
    import fsspec

    fs, path = fsspec.core.url_to_fs(scratch)
    fs.invalidate_cache()
    return (
        {str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)} if fs.exists(path) else set()
    )


def clear(scratch: str) -> None:
    """Remove the scratch directory, and the directory around it if that is empty (then this check made it)."""
    import fsspec

    fs, path = fsspec.core.url_to_fs(scratch)
    if fs.exists(path):
        fs.rm(path, recursive=True)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path)) if type(fs).__name__ == "LocalFileSystem" else None


def _free(path: str) -> dict[str, int] | None:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return {"total": usage.total, "free": usage.free}


def authentication() -> str:
    """How Ray's processes of this node authenticate: "token", "disabled", ..."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return "token" if is_token_auth_enabled() else "disabled"


def _or_error(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        return f"error: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
