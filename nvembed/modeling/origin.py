"""Where a model folder comes from: its content as one hash, and what its card says of licences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nvembed.core import storage
from nvembed.core.steps import describe_files
from nvembed.types import UserError

CARD = "README.md"  # says more of a model as more is known, and changes no vector: no part of its content


def content_hash(checksums: Mapping[str, str]) -> str:
    """Hash of a model folder's file names and checksums, but the card: folders with equal content are one version."""
    return storage.hash_json({name: found for name, found in checksums.items() if name != CARD})


def folder_content(folder: str) -> str:
    """`content_hash` of a folder's files.

    Raises:
        UserError: it is empty or missing.
    """
    files = describe_files(folder)
    if not files:
        raise UserError(f"{folder}: no model folder (it is empty or missing)")
    return content_hash({name: entry["xxh3_128"] for name, entry in files.items()})


def read_front_matter(card: Path) -> dict[str, Any]:
    """The YAML block that opens a model card; empty where there is no card, or none that can be read."""
    try:
        text = card.read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def card_facts(folder: Path) -> dict[str, Any]:
    """What a folder's card says of where the model comes from: `license`, `base_model`, `nvembed` (our own rows)."""
    front = read_front_matter(folder / CARD)
    return {key: front[key] for key in ("license", "base_model", "nvembed") if key in front}


def started_from(folder: Path) -> dict[str, Any]:
    """What the step that starts from a folder records of it: `content` and `card`."""
    return {"content": folder_content(str(folder)), "card": card_facts(folder)}
