"""Differences between the vectors of an exported model and of the original, and the limit beyond which it is refused.

Shapes: N texts, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvembed.core.steps import PROBES_JSON
from nvembed.modeling.embedder import Embedder, encode_prompted

BATCH = 8
Encode = Callable[[Sequence[str], Sequence[str]], np.ndarray]  # texts, prompts -> [N, D]


def embedder_encode(embedder: Embedder) -> Encode:
    """`encode_prompted` of an embedder."""
    return lambda texts, prompts: encode_prompted(embedder, texts, prompts)


class ParityError(RuntimeError):
    """An exported model gives other vectors than the original; nothing was written."""


@dataclass(frozen=True)
class Parity:
    """Differences over one set of texts.

    Attributes:
        texts: how many.
        max_difference: largest |difference| of a number of a vector.
        min_cosine: smallest cosine between a text's two vectors.
    """

    texts: int
    max_difference: float
    min_cosine: float

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TextSet:
    """Texts under one name, with their instructions."""

    name: str
    texts: tuple[str, ...]
    instructions: tuple[str, ...]


def text_sets(folder: Path, given: Sequence[str] = ()) -> list[TextSet]:
    """`probes` of a model folder, and `given` texts (as documents) where there are any."""
    rows = json.loads((folder / PROBES_JSON).read_text(encoding="utf-8"))
    sets = [TextSet("probes", tuple(row["text"] for row in rows), tuple(row["instruction"] for row in rows))]
    return [*sets, *([TextSet("given", tuple(given), ("",) * len(given))] if given else [])]


def reference(original: Embedder, sets: Sequence[TextSet]) -> dict[str, np.ndarray]:
    """The original's vectors of each set."""
    return {texts.name: embedder_encode(original)(texts.texts, texts.instructions) for texts in sets}


def measure(expected: Mapping[str, np.ndarray], encode: Encode, sets: Sequence[TextSet]) -> dict[str, Parity]:
    """Parity of each set, in batches of `BATCH`, so that padding of several lengths takes part."""
    parity = {}
    for texts in sets:
        parts = [
            encode(texts.texts[start : start + BATCH], texts.instructions[start : start + BATCH])
            for start in range(0, len(texts.texts), BATCH)
        ]
        parity[texts.name] = compare(expected[texts.name], np.concatenate(parts))
    return parity


def compare(expected_ND: np.ndarray, found_ND: np.ndarray) -> Parity:
    """Two matrices of vectors, row by row.

    Raises:
        ParityError: their shapes differ, or a number is not finite.
    """
    if expected_ND.shape != found_ND.shape or not np.isfinite(found_ND).all():
        raise ParityError(f"vectors {found_ND.shape} where {expected_ND.shape} finite numbers were expected")
    expected_ND, found_ND = expected_ND.astype(np.float64), found_ND.astype(np.float64)
    lengths_N = np.linalg.norm(expected_ND, axis=1) * np.linalg.norm(found_ND, axis=1)
    cosine_N = (expected_ND * found_ND).sum(axis=1) / np.maximum(lengths_N, np.finfo(np.float64).tiny)
    return Parity(len(expected_ND), float(np.abs(expected_ND - found_ND).max()), float(cosine_N.min()))


def refuse_beyond(parity: dict[str, Parity], limit: float, what: str) -> None:
    """Raise ParityError when any set differs by more than `limit`."""
    worst = max(differences.max_difference for differences in parity.values())
    if not worst <= limit:
        raise ParityError(f"{what} gives other vectors: largest difference {worst:.3g}, at most {limit:g} is allowed")
