"""Format versions of stored files: which nvembed wrote a file, and whether this one reads it.

Artifacts, checkpoints, model folders, recipes and exports each carry the number of their format and the nvembed that
wrote them. A reader takes every format from the oldest it can convert to its own; a newer one is refused with the
version to install. `tests/assets/formats/` keeps a sample of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import ValidationError

from nvembed.types import Config, UserError

WRITER = "nvembed_version"  # the key beside `format_version`


class FormatError(UserError):
    """The format of a file is not one this nvembed reads; the message names the remedy."""


def own_version() -> str:
    """Version of this nvembed; "0" where it runs without being installed."""
    try:
        return version("nvembed")
    except PackageNotFoundError:
        return "0"


def stamp(number: int) -> dict[str, Any]:
    """The keys that say format and writer."""
    return {"format_version": number, WRITER: own_version()}


def check_format(record: Mapping[str, Any], where: str, *, newest: int, oldest: int = 1) -> int:
    """The format of a record, when it can be read.

    Args:
        record: what carries `format_version`, and `nvembed_version` where its writer knew to leave it.
        where: the file, for messages.
        newest: the format this nvembed writes.
        oldest: the oldest it reads.

    Raises:
        FormatError: no whole number, a newer format (with the nvembed to install), or one no longer read.
    """
    number = record.get("format_version")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise FormatError(f"{where} has format version {number!r}, which no nvembed wrote. The file is damaged.")
    span = f"{newest}" if oldest == newest else f"{oldest} to {newest}"
    reads = f"nvembed {own_version()} reads {span}"
    if number > newest:
        writer = record.get(WRITER)
        made = f"nvembed {writer}" if writer else "a newer nvembed"
        upgrade = f"nvembed>={writer}" if writer else "--upgrade nvembed"
        raise FormatError(f"{where} has format version {number}, made by {made}; {reads}. Run: pip install '{upgrade}'")
    if number < oldest:
        raise FormatError(f"{where} has format version {number}; {reads}. Build it again.")
    return number


def with_defaults(record: dict[str, Any], kind: type[Config]) -> dict[str, Any]:
    """A step's record with the keys that `kind` has gained since it was written, at their defaults.

    An output that lacks only such keys is still the output of the same config. A change that gives the default of a key
    another meaning has to bump the logic version.
    """
    try:
        return {**record, "config": kind.model_validate(record["config"]).model_dump(mode="json")}
    except (KeyError, ValidationError):  # the comparison that follows reports it
        return record
