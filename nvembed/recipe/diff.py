"""What differs between two recipes as they are resolved (layer 6). Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nvembed.recipe.schema import Recipe

ABSENT = "(absent)"


def differences(first: Recipe, second: Recipe) -> list[dict[str, Any]]:
    """Values that differ, by path: `{"path", "a", "b"}`; a section that only one has is one difference.

    The data sets of `prepare.sources` are compared by their names, so their order is a difference of its own.
    """
    return _compare(_by_name(first), _by_name(second), "")


def _by_name(recipe: Recipe) -> dict[str, Any]:
    value = recipe.model_dump(mode="json")
    sources = value["prepare"]["sources"]
    value["prepare"]["sources"] = {source["name"]: source for source in sources}
    value["prepare"]["order of sources"] = [source["name"] for source in sources]
    return value


def _compare(a: Any, b: Any, path: str) -> list[dict[str, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.get("type") == b.get("type"):
        found = []
        for key in [*a, *(key for key in b if key not in a)]:
            here = f"{path}.{key}" if path else str(key)
            found += _compare(a.get(key, ABSENT), b.get(key, ABSENT), here)
        return found
    return [] if a == b else [{"path": path, "a": a, "b": b}]


def difference_lines(found: list[dict[str, Any]]) -> list[str]:
    """One line a difference."""
    return [f"{item['path']}: {_short(item['a'])} -> {_short(item['b'])}" for item in found]


def _short(value: Any) -> str:
    return value if value == ABSENT else json.dumps(value, ensure_ascii=False)
