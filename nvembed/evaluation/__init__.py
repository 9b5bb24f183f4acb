"""Held-out metrics with intervals, the steps `evaluate` and `baselines`, and an mteb adapter.

`evaluate_retrieval` works on texts in memory, without a recipe; it is imported when first used.
"""

from __future__ import annotations

from typing import Any

__all__ = ["evaluate_retrieval"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nvembed.evaluation.retrieval import evaluate_retrieval

    return evaluate_retrieval
