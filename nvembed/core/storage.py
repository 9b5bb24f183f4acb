"""Files at any fsspec URI: reading, writing whole files, hashes.

A written file appears whole or not at all; transient errors of remote stores are retried (`core/retry.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from nvembed.core.retry import RetriedFile, placed, retried
from nvembed.core.secrets import mask
from nvembed.core.uris import file_path, is_file_uri, is_path
from nvembed.types import UserError

_CHUNK = 1 << 20


# -- files ----------------------------------------------------------------------------------------------------------


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a URI, a `file:` URI or a plain path, and the path inside it."""
    if is_file_uri(uri):
        uri = file_path(uri)
    if is_path(uri):  # fsspec takes `::` in a name for a chain of protocols
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, path


def uri_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The URI, or plain local path, of a path inside a filesystem; what `filesystem` takes apart."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


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
    """Whether the URI exists."""
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
def files_below(uri: str) -> dict[str, str]:
    """Every file under a URI, at any depth: its name relative to the URI -> its path in the filesystem; sorted.

    A foreign store may list anything (the key of an object, the member of an archive), and what is fetched is
    joined to a folder here.

    Raises:
        UserError: a listed name would leave its folder; nothing of such a listing is used.
    """
    fs, root = filesystem(uri)
    fs.invalidate_cache()
    prefix = root.rstrip("/") + "/" if root.strip("/") or root.startswith("/") else ""
    files = {}
    for path in map(str, fs.find(root)):
        if path == root or path.endswith("/"):  # a file itself; a store's marker of an empty folder
            continue
        relative = path[len(prefix) :]
        if not path.startswith(prefix) or not is_inside(relative):
            raise UserError(
                f"{mask(uri)} lists {path[:200]!r}, which is not a name below it (absolute, `..`, a backslash or a "
                "control character). Nothing of it is used; repair or replace it."
            )
        files[relative] = path
    return dict(sorted(files.items()))


def is_inside(relative: str) -> bool:
    """Whether a relative name, joined to a folder, is a file inside it on any system.

    Example:
        >>> [is_inside(name) for name in ("1_Pooling/config.json", "../x", "/x", "a/../../x", "C:\\x")]
        [True, False, False, False, False]
    """
    parts = relative.split("/")
    return not {"", ".", ".."} & set(parts) and "\\" not in relative and not any(ord(sign) < 32 for sign in relative)


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
    """A new file at any URI, its folder made: readers see the old contents or the new, never a part.

    On a disk it is a temporary file beside the target, renamed when the block ends; an object store publishes an
    object when it is closed. When the block raises, nothing is published.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with _whole_file(fs, path, uri) as file:
        yield file


@contextmanager
def _whole_file(fs: fsspec.AbstractFileSystem, path: str, uri: str) -> Iterator[IO[bytes]]:
    if isinstance(fs, LocalFileSystem):
        with _renamed(uri, path) as file:
            yield file
    elif fs.protocol == "memory":  # its files can be read while they are written
        buffer = io.BytesIO()
        yield buffer
        fs.pipe(path, buffer.getvalue())
    else:
        remote = fs.open(path, "wb")
        try:
            yield remote
            remote.close()
        except BaseException:
            with suppress(AttributeError, OSError):
                remote.discard()
            with suppress(AttributeError):
                remote.closed = True  # or the destructor uploads what was discarded
            raise


@contextmanager
def _renamed(uri: str, path: str) -> Iterator[IO[bytes]]:
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with placed(uri):
            with open(temporary, "wb") as file:
                yield file
            with open(temporary, "rb") as file:  # again, as a compressor closes the file it writes to
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@retried
def write_bytes(uri: str, data: bytes) -> None:
    """Write a file; readers see the old contents or the new, never a part (`open_writer`)."""
    fs, path = filesystem(uri)
    with _whole_file(fs, path, uri) as file:
        file.write(data)


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
