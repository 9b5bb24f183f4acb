"""InfoNCE over the documents of a global batch, and the masks that decide what counts as a negative.

Shapes: B examples of the global batch, G texts per example (query, positive, negatives), R rows (examples) of this
rank, C candidates of one query, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from nvembed.types import Batch


def info_nce(similarity_RC: torch.Tensor, positive_R: torch.Tensor, allowed_RC: torch.Tensor) -> torch.Tensor:
    """-log softmax of the positive among the allowed candidates (van den Oord et al. 2018, eq. 4; NV-Embed 4.2).

    Args:
        similarity_RC: similarities already divided by the temperature.
        positive_R: int64, column of each row's positive.
        allowed_RC: bool, candidates that count; true at every positive.

    Returns:
        Loss of each row [R]; 0 where the positive is the only candidate.
    """
    masked_RC = similarity_RC.masked_fill(~allowed_RC, float("-inf"))
    return F.cross_entropy(masked_RC, positive_R, reduction="none")


def separation(similarity_RC: torch.Tensor, positive_R: torch.Tensor, allowed_RC: torch.Tensor) -> torch.Tensor:
    """Cosines of positives and negatives, for reports; no part of any loss, without gradient.

    Args:
        similarity_RC: cosines, not divided by the temperature.
        positive_R: int64, column of each row's positive.
        allowed_RC: bool, candidates that count; true at every positive.

    Returns:
        float64 [4], sums over the rows that have a negative: the positive's cosine, the mean of the negatives', the
        hardest negative's, and the number of those rows. Sums of ranks add up.
    """
    cosine_RC, positive_R1 = similarity_RC.detach(), positive_R[:, None]
    negative_RC = allowed_RC.scatter(1, positive_R1, False)
    count_R = negative_RC.sum(dim=1)
    mean_R = cosine_RC.masked_fill(~negative_RC, 0.0).sum(dim=1, dtype=torch.float64) / count_R.clamp(min=1)
    hardest_R = cosine_RC.masked_fill(~negative_RC, -1.0).amax(dim=1)
    columns = (cosine_RC.gather(1, positive_R1)[:, 0], mean_R, hardest_R, torch.ones_like(mean_R))
    return torch.stack([(value_R * (count_R > 0)).sum(dtype=torch.float64) for value_R in columns])


def document_mask(batch: Batch, rows: slice) -> np.ndarray:
    """Which documents of the global batch are candidates for the queries of `rows`.

    A query's own positive always counts. No other document does that is absent, is a known positive of the query, or
    is a copy (same id) of a document in an earlier slot; a copy of one of the query's own negatives is kept in the
    query's own slot, so that the same document is never counted twice.

    Returns:
        bool [R, B, G-1]; entry (r, j, k) is document slot k+1 of example j.
    """
    ids_BK = batch.document_ids[:, 1:]
    present_BK = batch.present[:, 1:]
    first_BK = _first_occurrences(ids_BK, present_BK)
    masks = []
    for i in range(*rows.indices(batch.batch_size)):
        own_ids_K, own_present_K = ids_BK[i], present_BK[i]
        first_own_K = _first_occurrences(own_ids_K[None], own_present_K[None])[0]
        allowed_BK = first_BK & ~np.isin(ids_BK, own_ids_K[own_present_K])
        allowed_BK[i] = first_own_K
        allowed_BK &= ~np.isin(ids_BK, np.append(batch.positive_ids[i], own_ids_K[0]))
        allowed_BK[i, 0] = True
        masks.append(allowed_BK)
    shape = (0, *ids_BK.shape)
    return np.stack(masks) if masks else np.zeros(shape, dtype=bool)


def query_mask(batch: Batch, rows: slice) -> np.ndarray:
    """Which queries of the global batch are negatives of the queries of `rows` (Gecko, section 3.3).

    Not the query itself, not one with the same text, and not one that shares a known positive with it.

    Returns:
        bool [R, B].
    """
    size, group = batch.batch_size, batch.group_size
    texts = [batch.instructions[i * group] + batch.texts[i * group] for i in range(size)]
    known = [frozenset(batch.positive_ids[i].tolist()) | {int(batch.document_ids[i, 1])} for i in range(size)]
    chosen = range(*rows.indices(size))
    mask = [[texts[i] != texts[j] and known[i].isdisjoint(known[j]) for j in range(size)] for i in chosen]
    return np.array(mask, dtype=bool).reshape(len(chosen), size)


def _first_occurrences(ids_BK: np.ndarray, present_BK: np.ndarray) -> np.ndarray:
    """True at the first present slot of every distinct id, in reading order."""
    first = np.zeros(ids_BK.size, dtype=bool)
    slots = np.flatnonzero(present_BK.reshape(-1))
    _, index = np.unique(ids_BK.reshape(-1)[slots], return_index=True)
    first[slots[index]] = True
    return first.reshape(ids_BK.shape)
