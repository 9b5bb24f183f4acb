"""Every key of a recipe and of a target is described in its JSON schema, which editors show."""

from typing import Any

import pytest
from pydantic import BaseModel, Field

from nvembed.jobs.target import KINDS
from nvembed.recipe.schema import Recipe

SHORTEST = 10  # characters


def undescribed(model: type[BaseModel]) -> list[str]:
    """Keys whose description is missing, is too short, or does not end with a full stop.

    Pydantic leaves out a description that only repeats the docstring of the key's section.
    """
    root = model.model_json_schema()
    sections: dict[str, dict[str, Any]] = {model.__name__: root, **root.get("$defs", {})}
    described = {
        f"{section}.{key}": schema.get("description", "")
        for section, body in sections.items()
        for key, schema in body.get("properties", {}).items()
    }
    assert described
    return [key for key, text in described.items() if len(text) < SHORTEST or not text.endswith(".")]


@pytest.mark.parametrize("model", [Recipe, *KINDS.values()])
def test_every_key_is_described(model: type[BaseModel]) -> None:
    assert undescribed(model) == []


def test_missing_descriptions_are_listed() -> None:
    class Section(BaseModel):
        """The section."""

        key: int = 0
        named: int = Field(0, description="Number of rows.")

    class Root(BaseModel):
        section: Section = Field(Section(), description="The section.")
        short: int = Field(0, description="Rows.")
        open: int = Field(0, description="Number of rows")

    assert undescribed(Root) == ["Root.section", "Root.short", "Root.open", "Section.key"]
