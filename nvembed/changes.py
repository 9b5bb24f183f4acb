"""What differs between two JSON values, in words (layer 0)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ABSENT = object()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines `path: old -> new` for every leaf in which two JSON values differ; a key that is not there is `(none)`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted(set(old) | set(new), key=str):
            here = f"{path}.{key}" if path else str(key)
            lines += differences(old.get(key, _ABSENT), new.get(key, _ABSENT), here)
        return lines
    before, after = (_shown(value) for value in (old, new))  # as text: in JSON 1, 1.0 and true are not the same
    return [] if before == after else [f"{path}: {before} -> {after}"]


def _shown(value: Any) -> str:
    return "(none)" if value is _ABSENT else json.dumps(value, default=str, sort_keys=True, ensure_ascii=False)
