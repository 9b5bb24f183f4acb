"""Differences between two resolved recipes.

One algorithm finds them in all JSON values, `nvembed.core.steps.changed_values`. Here is what is particular to recipes:
data sets are compared by name, and sections of different `type` as wholes.
"""

from __future__ import annotations

import json
from typing import Any

from nvembed.core.steps import ABSENT, changed_values
from nvembed.recipe.schema import Recipe

NO_VALUE = "(absent)"


def compare_recipes(first: Recipe, second: Recipe) -> list[dict[str, Any]]:
    """Values that differ, by path: `{"path", "a", "b"}`; a section that only one has is one difference.

    The data sets of `prepare.sources` are compared by their names, so their order is a difference of its own.
    """
    a, b = _by_name(first), _by_name(second)
    changes = list(changed_values(a, b))
    other_type = {path[:-1] for path, _, _ in changes if path[-1] == "type"}
    paths = [next((path[:end] for end in range(len(path)) if path[:end] in other_type), path) for path, _, _ in changes]
    return [{"path": ".".join(path), "a": _value(a, path), "b": _value(b, path)} for path in dict.fromkeys(paths)]


def _by_name(recipe: Recipe) -> dict[str, Any]:
    value = recipe.model_dump(mode="json")
    sources = value["prepare"]["sources"]
    value["prepare"]["sources"] = {source["name"]: source for source in sources}
    value["prepare"]["order of sources"] = [source["name"] for source in sources]
    return value


def _value(recipe: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = recipe
    for part in path:
        value = value.get(part, ABSENT)
    return NO_VALUE if value is ABSENT else value


def difference_lines(differences: list[dict[str, Any]]) -> list[str]:
    """One line per difference: `path: a -> b`."""
    return [f"{item['path']}: {_shown(item['a'])} -> {_shown(item['b'])}" for item in differences]


def _shown(value: Any) -> str:
    return value if value == NO_VALUE else json.dumps(value, ensure_ascii=False)
