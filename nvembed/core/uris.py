"""Paths as URIs and back: `file:` and SQLite, for any name a directory may have.

A plain path is never decoded: `%20` in it is three characters of a name. A `file:` URI is percent-encoded (RFC 8089),
and so is the database of a SQLAlchemy URL.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from nvembed.types import UserError

SQLITE = "sqlite:///"
_FILE = re.compile(r"file:(//(localhost)?(?=/))?", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_file_uri(uri: str) -> bool:
    """Whether a string is a `file:` URI: `file:///a`, `file:/a`."""
    return bool(_FILE.match(uri)) and uri[_FILE.match(uri).end() :].startswith("/")  # type: ignore[union-attr]


def is_path(uri: str) -> bool:
    """Whether a string is a plain path: it names no protocol."""
    return not _SCHEME.search(uri) and not is_file_uri(uri)


def file_uri(path: str | Path) -> str:
    """The `file:` URI of a path.

    Example:
        >>> file_uri("/runs/50 %")
        'file:///runs/50%20%25'
    """
    return Path(path).absolute().as_uri()


def file_path(uri: str) -> str:
    """The path of a `file:` URI; the inverse of `file_uri`.

    Example:
        >>> file_path("file:///runs/50%20%25")
        '/runs/50 %'
    """
    return unquote(_FILE.sub("", uri, count=1))


def sqlite_uri(database: str | Path) -> str:
    """The URI of a SQLite file as SQLAlchemy and MLflow read it.

    Raises:
        UserError: the path has a `%` or `?`, and the installed SQLAlchemy cannot open such a file.
    """
    path = str(Path(database).absolute())
    encoded = path.replace("%", "%25").replace("?", "%3F")
    if encoded != path and not _sqlalchemy_decodes():
        raise UserError(
            f"{path}: MLflow's database cannot lie below a path with % or ? with this SQLAlchemy. Choose another path, "
            "or run: pip install 'sqlalchemy>=2.1'"
        )
    return SQLITE + encoded


def sqlite_path(uri: str) -> Path:
    """The absolute path of a SQLite URI; the inverse of `sqlite_uri`. Options after `?` are left out."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0])).absolute()


def _sqlalchemy_decodes() -> bool:
    from sqlalchemy import make_url

    return make_url(f"{SQLITE}%25").database == "%"
