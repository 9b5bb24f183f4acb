"""Matryoshka prefixes: the first d coordinates of an embedding are an embedding of their own (Kusupati et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from nvembed.types import UserError


def check_prefixes(dims: Sequence[int], width: int) -> tuple[int, ...]:
    """The widths an objective trains: the full one, then the prefixes from wide to narrow.

    Raises:
        UserError: a prefix is not narrower than the embedding, or is named twice.
    """
    wrong = sorted(d for d in dims if not 0 < d < width)
    if wrong:
        raise UserError(
            f"objective.matryoshka_dims holds {', '.join(map(str, wrong))}, but the embedding is {width} wide. "
            f"Name prefixes between 1 and {width - 1}; the full width is always trained."
        )
    if len(set(dims)) != len(dims):
        raise UserError(f"objective.matryoshka_dims names a width twice: {', '.join(map(str, dims))}.")
    return (width, *sorted(dims, reverse=True))


def prefix(embeddings_ND: torch.Tensor, width: int) -> torch.Tensor:
    """The first `width` coordinates, L2-normalised again; the embedding itself at its full width.

    Args:
        embeddings_ND: unit rows, or zero rows for absent texts (which stay zero).

    Returns:
        [N, width].
    """
    return embeddings_ND if width == embeddings_ND.shape[1] else F.normalize(embeddings_ND[:, :width], dim=-1)


def prefix_rows(matrix_ND: np.ndarray, width: int) -> np.ndarray:
    """`prefix` of stored vectors: float32 [N, width], contiguous, L2-normalised again at any width.

    Args:
        matrix_ND: float32 vectors; zero rows stay zero.
    """
    rows_NW = matrix_ND[:, :width]
    norm_N1 = np.linalg.norm(rows_NW, axis=1, keepdims=True)
    return np.ascontiguousarray(rows_NW / np.maximum(norm_N1, np.finfo(np.float32).tiny), dtype=np.float32)
