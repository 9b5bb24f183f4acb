"""Exact inner-product top-k over document shards, in bounded memory, the same bytes for any division of the work.

Documents stream through in segments, queries stay. Products in bf16 (fp32 where the processor has no bf16) propose;
the score is the fp64 dot of each pair, added up in a fixed order. A document is left out only on proof
(`bounds.py`), every query carries a certificate of that, and ties of any number are settled by id.

Shapes: Q queries, N documents, D dimensions, k results.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from nvembed.core.arguments import check_choice, check_count, public, shown
from nvembed.modeling.precision import PRECISIONS, check_device
from nvembed.retrieval.exact.bounds import has_bounded_bf16
from nvembed.retrieval.exact.scan import QUERY_BLOCK, TILE, QueryBlock, Segment
from nvembed.retrieval.exact.topk import Best, order_by_score, pair_scores
from nvembed.types import UserError

__all__ = ["SearchResult", "order_by_score", "pair_scores", "search_exact", "search_shards", "search_vectors"]

SEGMENT_BYTES = 96 * 2**20  # fp32 bytes of the documents that are searched together; bf16 adds half of it
Shards = Iterable[tuple[Sequence[str] | np.ndarray, np.ndarray]]


@dataclass
class SearchResult:
    """Result of a search for Q queries.

    Attributes:
        plain: the best documents; None where only documents below a ceiling were searched.
        under: the best strictly below each query's ceiling; None without ceilings.
        above_Q: int64 [Q], documents at or above the ceiling; zeros when they were not counted.
        certificate_Q: float64 [Q], the k-th score less the best possible score of anything left out. Never negative;
            +inf where nothing was left out. How large it is depends on how the work was divided, its sign does not.
        again: queries that were searched again with fp32 products.
        documents: how many were searched.
    """

    plain: Best | None
    under: Best | None
    above_Q: np.ndarray
    certificate_Q: np.ndarray
    again: int
    documents: int


@public
def search_vectors(
    queries: np.ndarray | Sequence[Sequence[float]],
    documents: np.ndarray | Sequence[Sequence[float]] | Iterable[np.ndarray],
    k: int,
    *,
    ceiling: np.ndarray | Sequence[float] | None = None,
    precision: str = "auto",
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents with the highest inner product for every query, exactly; ties by row number, ascending.

    Args:
        queries: numbers [Q, D]: an array, a tensor, a table of numbers or a list of vectors; used as float32.
        documents: numbers [N, D] likewise, a memory-mapped array included (no more than a segment of it is in memory),
            or an iterable of such matrices in order, read once.
        k: results per query.
        ceiling: float [Q]; only documents whose score is strictly below count. For positive-aware mining.
        precision: of the products that propose: "bf16", "fp32", or "auto" (bf16 where the processor has it). It changes
            the time, never the result.
        device: "cpu", "cuda" or "cuda:1".

    Returns:
        int64 [Q, k] row numbers, best first, -1 where fewer than k documents qualify, and float64 [Q, k] inner
        products, -inf there.

    Raises:
        UserError: what is no matrix of numbers, shapes that do not fit, k < 1 or beyond the memory, a ceiling that is
            no number, vectors that are not finite, an unknown precision or device, a precision the device lacks.

    Source: TPU-KNN (arXiv 2206.14286) for exact search at the speed of the product; the bounds are our own use of
    Higham, Accuracy and Stability of Numerical Algorithms, 3.1.

    Example:
        >>> import numpy as np
        >>> from nvembed import search_vectors
        >>> documents = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=np.float32)
        >>> rows, scores = search_vectors(np.array([[0.0, 1.0]]), documents, k=2)
        >>> rows.tolist(), scores.round(2).tolist()
        ([[2, 1]], [[1.0, 0.8]])
    """
    query_QD = as_matrix(queries, "queries")
    k = check_results("k", k, len(query_QD))
    ceiling_Q = None if ceiling is None else _as_ceiling(ceiling, len(query_QD))
    result = search_shards(
        query_QD,
        numbered(documents),
        plain=k if ceiling_Q is None else 0,
        under=k if ceiling_Q is not None else 0,
        ceiling_Q=ceiling_Q,
        precision=precision,
        device=device,
        id_type=np.int64,
    )
    best = result.plain or result.under
    assert best is not None
    return np.where(np.isfinite(best.scores_QK), best.ids_QK, -1), best.scores_QK


def search_exact(
    query_QD: np.ndarray, shards: Shards, k: int, block: int = TILE, *, below_Q: np.ndarray | None = None
) -> tuple[list[list[str]], np.ndarray]:
    """`search_vectors` for documents with ids of their own; ties by id, ascending.

    Args:
        query_QD: float32 [Q, D].
        shards: `(ids, float32 [N, D])`, read once; ids are unique over all shards.
        k: results per query.
        block: documents multiplied at once.
        below_Q: float64 [Q]; only documents whose score is strictly below count (the mining rule's ceiling).

    Returns:
        ids [Q][<= k] best first, and float64 scores [Q, k], -inf where fewer than k documents exist (k is cut to the
        number of documents).
    """
    result = search_shards(
        query_QD,
        shards,
        plain=k if below_Q is None else 0,
        under=k if below_Q is not None else 0,
        ceiling_Q=below_Q,
        tile=block,
    )
    best = result.plain or result.under
    assert best is not None
    width = min(k, result.documents)
    scores_QK = best.scores_QK[:, :width]
    ids = [list(row[: int(count)]) for row, count in zip(best.ids_QK, np.isfinite(scores_QK).sum(axis=1), strict=True)]
    return ids, scores_QK


def search_shards(
    query_QD: np.ndarray,
    shards: Shards,
    *,
    plain: int,
    under: int = 0,
    ceiling_Q: np.ndarray | None = None,
    count_above: bool = False,
    precision: str = "auto",
    device: str = "cpu",
    tile: int = TILE,
    id_type: np.dtype | type = object,
) -> SearchResult:
    """Search every shard for every query: the whole of it, or one part whose `Best` lists are merged with others.

    Args:
        query_QD: float32 [Q, D].
        shards: `(ids, float32 [N, D])`, read once; ids are unique over all shards.
        plain: length of the plain list; 0 for none.
        under: length of the list below `ceiling_Q`; 0 for none.
        ceiling_Q: float64 [Q]; +inf for queries without a ceiling.
        count_above: whether documents at or above the ceiling are counted, exactly.
        tile: documents multiplied at once.
        id_type: numpy type of the ids: object for strings, int64 for row numbers.
    """
    if max(plain, under) < 1:
        raise UserError(f"k is {max(plain, under)}; give a whole number of at least 1.")
    device = check_device(device)
    precision = choose_precision(precision, device)
    query_QD = np.ascontiguousarray(query_QD, dtype=np.float32)
    blocks = [
        QueryBlock(
            query_QD[start : start + QUERY_BLOCK],
            plain=plain,
            under=under,
            ceiling_Q=None if ceiling_Q is None else np.asarray(ceiling_Q[start : start + QUERY_BLOCK], np.float64),
            count_above=count_above,
            precision=precision,
            device=device,
            tile=tile,
            id_type=id_type,
        )
        for start in range(0, max(len(query_QD), 1), QUERY_BLOCK)
    ]
    documents = 0
    for ids_S, matrix_SD in _segments(shards, query_QD.shape[1], id_type):
        segment = Segment(ids_S, matrix_SD, precision, device)
        documents += len(segment)
        for block in blocks:
            block.add(segment)
    return SearchResult(
        _joined([block.plain for block in blocks]),
        _joined([block.under for block in blocks]),
        np.concatenate([block.above_Q for block in blocks]),
        np.concatenate([block.certificates() for block in blocks]),
        int(sum(block.again_Q.sum() for block in blocks)),
        documents,
    )


def choose_precision(precision: str, device: str) -> str:
    """bf16 or fp32 for the products that propose; torch's settings are set so that it uses no other.

    Raises:
        UserError: an unknown precision or device; bf16 on a device without it.
    """
    check_choice("precision", precision, PRECISIONS)
    if check_device(device).startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = False  # 10-bit products would break the fp32 bound
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    elif torch.get_float32_matmul_precision() != "highest":
        torch.set_float32_matmul_precision("highest")
    if precision == "bf16" and not has_bounded_bf16(device):
        raise UserError("precision bf16: this processor has no bf16 products; use auto or fp32")
    return ("bf16" if has_bounded_bf16(device) else "fp32") if precision == "auto" else precision


def check_results(name: str, count: Any, queries: int) -> int:
    """A number of results per query whose lists fit in this machine's memory.

    Raises:
        UserError: no whole number, less than 1, too many.
    """
    number = check_count(name, count)
    needed, free = 16 * queries * number, psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"{name} is {number:,}: results of {queries:,} queries take {needed / 2**30:,.0f} GiB, {free / 2**30:,.0f} "
            f"are free. Give a smaller {name}, or fewer queries at a time."
        )
    return number


def _as_ceiling(ceiling: Any, queries: int) -> np.ndarray:
    """float64 [Q] of a user's ceilings."""
    try:
        if np.asarray(ceiling).dtype.kind not in "fiuO":
            raise TypeError("bool or text")
        ceiling_Q = np.asarray(ceiling, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"ceiling is {shown(ceiling)}; give one number for each query.") from error
    if ceiling_Q.shape != (queries,):
        raise UserError(f"ceiling has shape {ceiling_Q.shape}; give one number per query, ({queries},).")
    if np.isnan(ceiling_Q).any():
        row = int(np.isnan(ceiling_Q).argmax())
        raise UserError(f"ceiling[{row}] is not a number; give inf where a query has no ceiling.")
    return ceiling_Q


def as_array(vectors: Any, name: str) -> np.ndarray:
    """A user's vectors [N, D] in their own type of number; a memory map stays one.

    Raises:
        UserError: not a matrix of real numbers.
    """
    advice = "Give a matrix of numbers, one vector per row."
    if isinstance(vectors, str | bytes | Mapping | set | frozenset | Iterator) or vectors is None:
        raise UserError(f"{name} is {shown(vectors)}. {advice}")
    if isinstance(vectors, torch.Tensor):
        vectors = vectors.detach().cpu()
        vectors = vectors.float() if vectors.dtype == torch.bfloat16 else vectors
    try:
        array = np.asanyarray(vectors)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, sparse
        why = str(error).partition(".")[0]
        raise UserError(f"{name} is {shown(vectors)}, not a matrix ({why}). {advice}") from error
    if array.ndim != 2:
        stacked = f" A column of vectors: np.stack({name})." if array.dtype == object and array.ndim == 1 else ""
        single = f" One vector: {name}[None]." if array.ndim == 1 and len(array) and array.dtype.kind in "fiu" else ""
        what = f"is {shown(vectors)}" if array.ndim == 0 else f"has shape {array.shape}"
        raise UserError(f"{name} {what}. {advice}{stacked or single}")
    if array.dtype == object:
        try:
            array = array.astype(np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} holds something that is no number ({error}). {advice}") from error
    if array.dtype == bool or not np.can_cast(array.dtype, np.float32, "same_kind"):
        raise UserError(f"{name} is a matrix of {array.dtype}, not of real numbers. {advice}")
    if len(array) and not array.shape[1]:
        raise UserError(f"{name} has shape {array.shape}: its vectors have no numbers. {advice}")
    return array


def as_matrix(vectors: Any, name: str) -> np.ndarray:
    """A user's vectors as float32 [Q, D].

    Raises:
        UserError: not a matrix of real, finite numbers.
    """
    with np.errstate(over="ignore"):  # becomes infinity, which is refused here
        matrix = np.ascontiguousarray(as_array(vectors, name), dtype=np.float32)
    finite_Q = np.isfinite(matrix).all(axis=1)
    if not finite_Q.all():
        raise UserError(f"{name}[{int(finite_Q.argmin())}] holds NaN, infinity or a number beyond float32; correct it.")
    return matrix


def numbered(documents: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`(row numbers, vectors)` of a matrix or a stream of matrices; pages of a memory map are released once read.

    Raises:
        UserError: not a matrix of real numbers, or a part that is none.
    """
    first = 0
    for part in _parts(documents):
        rows = segment_rows(part.shape[1])
        for start in range(0, len(part), rows):
            piece = part[start : start + rows]
            yield np.arange(first + start, first + start + len(piece)), piece
            _release(part)
        first += len(part)


def _parts(documents: Any) -> Iterator[np.ndarray]:
    """The matrices of an iterable of them; an array, a tensor, a table or a list of vectors is one matrix."""
    whole = isinstance(documents, str | bytes | Mapping | set | frozenset) or not isinstance(documents, Iterable)
    streamed = not whole and not hasattr(documents, "__array__")
    if isinstance(documents, list | tuple):
        streamed = not documents or _depth(documents[0]) == 2
    if not streamed:
        yield as_array(documents, "documents")
        return
    for number, part in enumerate(documents):
        yield as_array(part, f"documents[{number}]")


def _depth(item: Any) -> int:
    """Dimensions of an array, or of nested lists by their first items."""
    if isinstance(item, list | tuple):
        return 1 + (_depth(item[0]) if item else 0)
    return int(getattr(item, "ndim", 0))


def _release(array: np.ndarray) -> None:
    """Release the pages of a memory map, which else count as this process's until the kernel reclaims them."""
    mapped = getattr(array, "_mmap", None)
    if isinstance(array, np.memmap) and array.mode == "r" and isinstance(mapped, mmap.mmap):
        mapped.madvise(mmap.MADV_DONTNEED)


def segment_rows(dim: int) -> int:
    """Documents of a segment."""
    return max(SEGMENT_BYTES // (4 * max(dim, 1)), 1)


def _segments(shards: Shards, dim: int, id_type: np.dtype | type) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shards cut and joined into segments; a whole segment inside one shard is not copied."""
    rows = segment_rows(dim)
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    count = 0
    for ids, matrix_ND in shards:
        if len(ids) != len(matrix_ND):
            raise ValueError(f"a shard has {len(ids)} ids and {len(matrix_ND)} vectors")
        if matrix_ND.ndim != 2 or matrix_ND.shape[1] != dim:
            raise UserError(
                f"documents have shape {matrix_ND.shape}, queries have {dim} dimensions. Embed both with one model."
            )
        ids_N = np.asarray(ids, dtype=id_type)
        start = 0
        while count + len(ids_N) - start >= rows:
            end = start + rows - count
            yield _join([*waiting, (ids_N[start:end], matrix_ND[start:end])])
            waiting, count, start = [], 0, end
        if start < len(ids_N):
            waiting.append((ids_N[start:], matrix_ND[start:]))
            count += len(ids_N) - start
    if count:
        yield _join(waiting)


def _join(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if len(parts) == 1:
        return parts[0][0], np.ascontiguousarray(parts[0][1], dtype=np.float32)
    matrix_SD = np.concatenate([part for _, part in parts], dtype=np.float32, casting="unsafe")
    return np.concatenate([ids for ids, _ in parts]), matrix_SD


def _joined(parts: Sequence[Best | None]) -> Best | None:
    lists = [part for part in parts if part is not None]
    if not lists:
        return None
    whole = Best(0, lists[0].k, lists[0].ids_QK.dtype)
    whole.scores_QK = np.concatenate([part.scores_QK for part in lists])
    whole.ids_QK = np.concatenate([part.ids_QK for part in lists])
    return whole
