"""The one batching mechanism: token-budget chunks over token lengths; used by encode, train and rank (numpy only)."""

from __future__ import annotations

import numpy as np


def token_budget_chunks(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut texts into chunks whose padded size, count * longest, stays within `budget`.

    Args:
        lengths: int [N], tokens of each text; texts of length 0 are absent and belong to no chunk.
        budget: tokens of one forward, padding included. A text longer than it is a chunk of its own.

    Returns:
        Index arrays, texts sorted by (length, index): padding stays small and the cut is deterministic.
    """
    lengths = np.asarray(lengths)
    order = np.lexsort((np.arange(len(lengths)), lengths))
    order = order[lengths[order] > 0]
    chunks: list[np.ndarray] = []
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end - start + 1) * lengths[order[end]] > budget:
            chunks.append(order[start:end].astype(np.int64))
            start = end
    return chunks


def plan_chunks(lengths: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
    """Deal the chunks of one global batch to ranks: balanced by tokens, every rank the same number.

    Texts are first dealt to ranks (longest first, each to the rank with the fewest tokens), then each rank's texts
    are cut by the budget: a batch that fits is one chunk a rank. Ranks with fewer chunks get empty ones, because
    ZeRO-3 gathers weights collectively in every forward.

    Returns:
        `plan[rank][chunk]`: int64 index arrays into the global batch.
    """
    lengths = np.asarray(lengths)
    tokens = [0] * world_size
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    for index in order[lengths[order] > 0]:
        rank = min(range(world_size), key=lambda r: (tokens[r], r))
        dealt[rank].append(int(index))
        tokens[rank] += int(lengths[index])
    plan = []
    for members in dealt:
        indices = np.array(sorted(members), dtype=np.int64)
        chunks = token_budget_chunks(lengths[indices], budget) if len(indices) else []
        plan.append([indices[chunk] for chunk in chunks])
    count = max(1, max(len(chunks) for chunks in plan))
    empty = np.zeros(0, dtype=np.int64)
    return [chunks + [empty] * (count - len(chunks)) for chunks in plan]
