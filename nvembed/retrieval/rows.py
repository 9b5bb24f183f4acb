"""Rows of texts to rows of vectors: equal rows once, cached ones from the cache, unusable ones named and left out.

Shapes: N rows, A accepted rows, U different ones, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nvembed.retrieval.cache import UNKNOWN, VectorCache, row_key
from nvembed.retrieval.encoders import Encoder
from nvembed.text.identity import MAX_TEXT_BYTES, refuse_texts, text_problem

NOT_FINITE = "has a vector with NaN or infinity"


@dataclass
class Encoded:
    """Result of encoding N rows.

    Attributes:
        matrix_AD: float32, unit vectors of the accepted rows, in order.
        accepted_A: int64, their places among the N.
        rejected: place -> why, as the end of a sentence.
        embedded: texts the model ran on.
        cached: different texts whose vectors came from the cache.
        cut_A: int8, 1 where a text had more tokens than were embedded, 0 where not, -1 where it is not known.
    """

    matrix_AD: np.ndarray
    accepted_A: np.ndarray
    rejected: dict[int, str]
    embedded: int
    cached: int
    cut_A: np.ndarray


def encode_checked(
    encoder: Encoder,
    texts: Sequence[str],
    prompts: Sequence[str],
    max_lengths: Sequence[int | None] | None = None,
    *,
    cache: VectorCache | None = None,
    max_bytes: int = MAX_TEXT_BYTES,
) -> Encoded:
    """Encode rows; equal (prompt, text, max_length) rows are encoded once and so have equal vectors.

    Args:
        texts: N; anything but a text that can be embedded is rejected (`text_problem`).
        prompts: N, "" for none.
        max_lengths: most tokens of each text, None for the model's own; None for all.
        cache: looked in, and given what was embedded.
        max_bytes: longer texts are rejected.
    """
    limits = [None] * len(texts) if max_lengths is None else list(max_lengths)
    problems = [text_problem(text, max_bytes) for text in texts]
    rejected = {index: problem for index, problem in enumerate(problems) if problem is not None}
    place: dict[tuple[str, str, int | None], int] = {}
    inverse = {
        index: place.setdefault((encoder.used_prompt(prompts[index]), texts[index], limits[index]), len(place))
        for index in range(len(texts))
        if index not in rejected
    }
    unique = list(place)
    keys = [row_key(text, prompt, limit or encoder.max_length) for prompt, text, limit in unique]
    known = {} if cache is None else cache.find(keys)
    matrix_UD = np.empty((len(unique), encoder.dim), dtype=np.float32)
    cut_U = np.full(len(unique), UNKNOWN, dtype=np.int8)
    for row, (vector, cut) in known.items():
        matrix_UD[row], cut_U[row] = vector, cut
    new = [row for row in range(len(unique)) if row not in known]
    for limit in dict.fromkeys(unique[row][2] for row in new):
        rows = [row for row in new if unique[row][2] == limit]
        used_prompts, chosen, _ = zip(*(unique[row] for row in rows), strict=True)
        cut_R = np.full(len(rows), UNKNOWN, dtype=np.int8)
        matrix_UD[rows] = encoder.encode(chosen, used_prompts, limit, cut_N=cut_R)
        cut_U[rows] = cut_R
    finite_U: np.ndarray = np.asarray(np.isfinite(matrix_UD).all(axis=1))
    if cache is not None:
        finite = [row for row in new if finite_U[row]]
        cache.add([keys[row] for row in finite], matrix_UD[finite], cut_U[finite])
    rejected |= {index: NOT_FINITE for index, row in inverse.items() if not finite_U[row]}
    accepted = np.array([index for index in inverse if index not in rejected], dtype=np.int64)
    rows = [inverse[int(index)] for index in accepted]
    return Encoded(matrix_UD[rows], accepted, dict(sorted(rejected.items())), len(new), len(known), cut_U[rows])


def refuse_rejected(encoded: Encoded, names: Sequence[str], where: str) -> None:
    """Raise an error for rejected rows where no row may be missing."""
    advice = ""
    if NOT_FINITE in encoded.rejected.values():
        advice = " For vectors that are not finite try `precision: fp32`, or check the model's weights."
    refuse_texts(where, {names[index]: reason for index, reason in encoded.rejected.items()}, advice)
