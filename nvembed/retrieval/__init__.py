"""Encoding in actor pools, the vector cache, exact and approximate search, BM25.

`encode_texts` and `search_vectors` work on plain lists and arrays, without a recipe; they are imported when first used.
"""

from __future__ import annotations

from typing import Any

__all__ = ["encode_texts", "search_vectors"]

_HOMES = {"encode_texts": "encode", "search_vectors": "exact.search"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
