"""Operations of the exact search on a device: operands, hits of a tile, fp64 scores of pairs.

The numbers are the same on every device: products only propose, and the fp64 scores are elementwise products and sums
in one fixed order, which a GPU rounds as a CPU does.

Shapes: Q queries of a block, N documents of a tile (or vectors of either), D dimensions, P (query, document) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from nvembed.retrieval.exact.bounds import LARGEST, Sizes, as_tensor, halved, norms
from nvembed.retrieval.exact.topk import fold_width, gathered_scores

_TERMS = 1 << 25  # fp64 terms of pairs that a device holds at once


class Vectors:
    """The queries or the documents of a search: fp32 rows, the operand of the products, and lengths for the bounds."""

    def __init__(self, matrix_ND: np.ndarray, precision: str, device: str) -> None:
        self.matrix_ND = matrix_ND
        self.full_ND = None if device == "cpu" else as_tensor(matrix_ND).to(device)
        if precision == "bf16":
            self.fast_ND, self.sizes = halved(matrix_ND if self.full_ND is None else self.full_ND)
        else:
            self.fast_ND = as_tensor(matrix_ND) if self.full_ND is None else self.full_ND
            self.sizes = Sizes(norms(matrix_ND), np.zeros(len(matrix_ND)))

    def unusable(self) -> int | None:
        """Row of a vector that is not finite, or too long for the bounds."""
        norm_N = self.sizes.norm_N
        if np.isfinite(norm_N).all() and norm_N.max(initial=0.0) <= LARGEST:
            return None
        return int(np.flatnonzero(~(norm_N <= LARGEST))[0])


def scores_of_pairs(queries: Vectors, rows_P: np.ndarray, documents: Vectors, columns_P: np.ndarray) -> np.ndarray:
    """`topk.gathered_scores`, float64 [P], on the vectors' device; the same bits on any."""
    left_QD, right_ND = queries.full_ND, documents.full_ND
    if left_QD is None or right_ND is None:
        return gathered_scores(queries.matrix_ND, rows_P, documents.matrix_ND, columns_P)
    dim = left_QD.shape[1]
    block = max(_TERMS // max(dim, 1), 1)
    out_P = np.zeros(len(rows_P))
    for start in range(0, len(rows_P), block):
        part = slice(start, start + block)
        rows = torch.from_numpy(rows_P[part].astype(np.int64)).to(left_QD.device)
        columns = torch.from_numpy(columns_P[part].astype(np.int64)).to(left_QD.device)
        terms = left_QD[rows].double() * right_ND[columns].double()
        width = dim
        while width > 1:
            half = fold_width(width)
            terms[:, : width - half] += terms[:, half:width]
            width = half
        if dim:
            out_P[part] = terms[:, 0].cpu().numpy()
    return out_P + 0.0  # no minus zero


def kth_largest(approx_QN: torch.Tensor, k: int, below_Q: np.ndarray | None) -> np.ndarray:
    """float64 [Q], the k-th largest of each row (of those below a bound); -inf where fewer are."""
    if approx_QN.device.type != "cpu":
        if below_Q is not None:
            below_Q1 = torch.from_numpy(_float32_below(below_Q))[:, None].to(approx_QN.device)
            approx_QN = approx_QN.masked_fill(approx_QN > below_Q1, -torch.inf)
        return approx_QN.topk(k, dim=1).values[:, -1].double().cpu().numpy()
    values_QN = approx_QN.float().numpy()
    if below_Q is not None:
        values_QN = np.where(values_QN < below_Q[:, None], values_QN, np.float32(-np.inf))
    place = values_QN.shape[1] - k
    kth_Q: np.ndarray = np.partition(values_QN, place, axis=1)[:, place].astype(np.float64)
    return kth_Q


def hits(approx_QN: torch.Tensor, cut_Q: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(rows, columns, values) of scores at or above the cut, rows ascending; cuts are rounded down."""
    floor_Q = _float32_below(cut_Q)
    if approx_QN.dtype == torch.bfloat16:
        floor_Q = _bf16_below(floor_Q)
    if approx_QN.device.type != "cpu":
        floor_Q1 = torch.from_numpy(floor_Q)[:, None].to(approx_QN.device)
        at_rows, at_columns = (approx_QN >= floor_Q1.to(approx_QN.dtype)).nonzero(as_tuple=True)
        values = approx_QN[at_rows, at_columns].float()
        yield at_rows.cpu().numpy(), at_columns.int().cpu().numpy(), values.cpu().numpy()
    elif approx_QN.dtype == torch.bfloat16:
        bits_QN = approx_QN.view(torch.int16).numpy()
        if (floor_Q > 0).all():  # then bf16 numbers order as their bits do
            mask_QN = bits_QN >= (floor_Q.view(np.int32) >> 16).astype(np.int16)[:, None]
        else:
            mask_QN = (approx_QN >= torch.from_numpy(floor_Q)[:, None].bfloat16()).numpy()
        rows_P, columns_P = _positions(mask_QN)
        yield rows_P, columns_P, (bits_QN[rows_P, columns_P].astype(np.int32) << 16).view(np.float32)
    else:
        values_QN = approx_QN.numpy()
        rows_P, columns_P = _positions(values_QN >= floor_Q[:, None])
        yield rows_P, columns_P, values_QN[rows_P, columns_P]


def _positions(mask_QN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the true ones; eight at a time, as nearly all are false."""
    width = mask_QN.shape[1]
    if mask_QN.size % 8:
        flat = np.flatnonzero(mask_QN)
    else:
        words = np.flatnonzero(mask_QN.reshape(-1).view(np.uint64))
        inner = np.flatnonzero(mask_QN.reshape(-1, 8)[words])
        flat = (words[inner >> 3] << 3) + (inner & 7)
    rows_P = flat // width
    return rows_P, (flat - rows_P * width).astype(np.int32)


def _float32_below(values_Q: np.ndarray) -> np.ndarray:
    """The next fp32 number below each fp64 value: rounding never raises a cut."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(values_Q, dtype=np.float64).astype(np.float32)
    return np.nextafter(rounded, np.float32(-np.inf))


def _bf16_below(values_Q: np.ndarray) -> np.ndarray:
    """fp32 numbers rounded down to what bf16 can hold: a sum at or above a number is rounded to its rounding at least.

    Without it a sum just above a cut that lies between two bf16 numbers is rounded to the one below, and lost.
    """
    bits_Q = values_Q.view(np.uint32)
    away_Q = np.where(np.signbit(values_Q) & np.isfinite(values_Q), np.uint32(0xFFFF), np.uint32(0))
    return ((bits_Q + away_Q) & np.uint32(0xFFFF0000)).view(np.float32)
