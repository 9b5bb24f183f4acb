"""Proven bounds on the error of bf16 and fp32 inner products, and a check that a device keeps to them.

Let q^, d^ be the bf16 roundings of q, d and r_q = q - q^, r_d = d - d^ (both exact in fp32). Then
`q.d - q^.d^ = r_q.d + q^.r_d`; by Cauchy-Schwarz the *input rounding* costs at most `|r_q||d| + |q^||r_d|`: norms that
are computed from the vectors themselves, not guessed (about 0.0033 for unit vectors; the worst case is 0.0078).
The *products* of bf16 numbers have 16 significant bits and are exact in fp32. *Accumulation* in fp32, in any order,
costs at most `D * u * |q^||d^|` (Higham, Accuracy and Stability of Numerical Algorithms, 3.1) with u = 2^-24; u = 2^-22
is allowed for, because tensor cores cut instead of rounding. Inputs flushed as denormals cost at most 2^-126 times the
other factor, each. The last rounding of the sum to bf16 is monotone, so a cut that is itself rounded down loses
nothing; conversely, the sum behind a bf16 value v is within `2^-8 |v|` of it.

In fp32 there is no input rounding: `D * 2^-24 * |q||d|`, 1 % added for the norms' own rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from nvembed.modeling.precision import has_bf16

FP32_ROUNDOFF = 2.0**-24
BF16_SUM_ROUNDOFF = 2.0**-22
BF16_OUTPUT_ROUNDOFF = 2.0**-8
LARGEST = 1e15  # values beyond are no embeddings; their products could leave the range of fp32
_SLACK = 1.01
_CACHE_NUMBERS = 1 << 16
_TINY = 2.0**-124


@dataclass(frozen=True)
class Sizes:
    """Lengths of vectors and of their bf16 residuals, float64 [N], rounded up."""

    norm_N: np.ndarray
    residual_N: np.ndarray

    def largest(self) -> tuple[float, float]:
        """The longest vector and the longest residual."""
        return float(self.norm_N.max(initial=0.0)), float(self.residual_N.max(initial=0.0))


def norms(matrix_ND: np.ndarray) -> np.ndarray:
    """float64 [N], not below the true lengths."""
    square_N = np.concatenate(
        [np.einsum("nd,nd->n", rows, rows, dtype=np.float64) for rows in _in_cache(matrix_ND)] or [np.empty(0)]
    )
    return np.sqrt(square_N) * (1.0 + 1e-9)


def halved(matrix_ND: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, Sizes]:
    """The bf16 rounding of fp32 rows, on their device, and their sizes."""
    device = matrix_ND.device if isinstance(matrix_ND, torch.Tensor) else None
    half_ND = torch.empty(matrix_ND.shape, dtype=torch.bfloat16, device=device)
    norm_N, residual_N = (torch.empty(len(matrix_ND), device=device) for _ in range(2))
    start = 0
    for full in [matrix_ND] if isinstance(matrix_ND, torch.Tensor) else map(as_tensor, _in_cache(matrix_ND)):
        part = slice(start, start + len(full))
        half_ND[part] = full
        # fp32 sums of squares of D <= 2^17 numbers are right to 1 %
        torch.linalg.vector_norm(full, dim=1, out=norm_N[part])
        torch.linalg.vector_norm(full - half_ND[part], dim=1, out=residual_N[part])
        start += len(full)
    return half_ND, Sizes(*(part_N.double().cpu().numpy() * _SLACK for part_N in (norm_N, residual_N)))


def as_tensor(matrix_ND: np.ndarray) -> torch.Tensor:
    """A tensor over the same memory; over a copy where it is read-only (memory maps), which torch does not support."""
    return torch.from_numpy(matrix_ND if matrix_ND.flags.writeable else matrix_ND.copy())


def _in_cache(matrix_ND: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(_CACHE_NUMBERS // max(matrix_ND.shape[1], 1), 1)
    for start in range(0, len(matrix_ND), rows):
        yield matrix_ND[start : start + rows]


def bf16_error(query: Sizes, document: Sizes, dim: int) -> np.ndarray:
    """Bound of the error of bf16 products, by query: float64 [Q].

    No bf16 product of the query with one of the documents differs more from the exact product, before its sum is
    rounded to bf16.
    """
    longest, rest = document.largest()
    rounded_Q, rounded = query.norm_N + query.residual_N, longest + rest
    inputs_Q = query.residual_N * longest + rounded_Q * rest
    sums_Q = dim * BF16_SUM_ROUNDOFF * rounded_Q * rounded
    return inputs_Q + _SLACK * sums_Q + dim * _TINY * (1.0 + rounded_Q + rounded)


def fp32_error(norm_Q: np.ndarray, longest: float, dim: int) -> np.ndarray:
    """Bound of the error of fp32 products, by query: float64 [Q]."""
    return _SLACK * dim * FP32_ROUNDOFF * norm_Q * longest + dim * _TINY * (1.0 + norm_Q + longest)


@cache
def has_bounded_bf16(device: str) -> bool:
    """Whether a device has bf16 products and they keep to the bound: measured, not assumed."""
    return has_bf16(device) and _keeps_the_bound(device)


def _keeps_the_bound(device: str = "cpu") -> bool:
    """Products of two widths against fp64; partial sums in bf16 would exceed the bound."""
    generator = np.random.default_rng(0)
    for dim in (384, 4096):
        left = generator.uniform(0.5, 1.5, (64, dim)).astype(np.float32)  # same signs: the largest partial sums
        right = generator.uniform(0.5, 1.5, (256, dim)).astype(np.float32)
        (left_QD, left_sizes), (right_ND, right_sizes) = halved(left), halved(right)
        product = (left_QD.to(device) @ right_ND.to(device).T).double().cpu().numpy()
        exact = left.astype(np.float64) @ right.astype(np.float64).T
        allowed = bf16_error(left_sizes, right_sizes, dim)[:, None] + BF16_OUTPUT_ROUNDOFF * np.abs(product)
        if not (np.abs(product - exact) <= allowed).all():
            return False
    return True
