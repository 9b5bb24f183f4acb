"""nvembed: from raw text mixtures to a registered embedding model and its distilled students.

The public API is imported when it is first used, so that `import nvembed` loads neither torch nor ray.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Embedder": "nvembed.modeling.embedder",
    "encode_texts": "nvembed.retrieval.encode_list",
    "evaluate_retrieval": "nvembed.evaluation.retrieval",
    "load_embedder": "nvembed.modeling.folder",
    "mine_vectors": "nvembed.mining.api",
    "run_pipeline": "nvembed.pipeline.execution",
    "search_vectors": "nvembed.retrieval.exact.search",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
