"""The training sets of NV-Embed v1 and v2, read from `nv_embed_sets.yaml` beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from nvembed.types import Config

PLACE = Path(__file__).with_name("nv_embed_sets.yaml")


class TrainingSet(Config):
    """One set, and what is known of it from where; the head of the YAML file says what the fields mean."""

    name: str
    versions: tuple[Literal[1, 2], ...]
    stages: tuple[Literal[1, 2], ...]
    task: Literal["retrieval", "classification", "clustering", "sts"]
    hub: str | None
    hub_source: str
    licence: str
    licence_source: str
    instruction: str
    instruction_source: str
    samples: int = Field(ge=1)
    samples_verified: bool
    positives_from: dict[Literal[1, 2], Literal["labels", "examples"]] | None = None
    reader: dict[str, Any]

    def source(self, version: Literal[1, 2], max_test: int) -> dict[str, Any]:
        """The set as an entry of `prepare.sources`, capped at its sample count."""
        entry = {"name": self.name, **self.reader, "licence": self.licence, "instruction": self.instruction}
        if self.task != "retrieval":
            entry["task"] = self.task
        if self.positives_from is not None:
            entry["positives_from"] = self.positives_from[version]
        return {**entry, "max_train": self.samples, "max_test": max_test}


def load_catalogue() -> tuple[TrainingSet, ...]:
    """Every set, retrieval first."""
    listed = yaml.safe_load(PLACE.read_text(encoding="utf-8"))["sets"]
    return tuple(TrainingSet.model_validate(row) for row in listed)
