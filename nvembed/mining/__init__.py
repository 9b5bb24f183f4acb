"""Hard negatives: selection rules, the `mine` step, the audit.

`mine_vectors` works on plain arrays, without a recipe; it is imported when first used.
"""

from __future__ import annotations

from typing import Any

__all__ = ["mine_vectors"]


def __getattr__(name: str) -> Any:
    if name != "mine_vectors":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nvembed.mining.api import mine_vectors

    return mine_vectors
