"""The one batching mechanism: chunks of similar token length within a token budget (numpy only).

A padded chunk costs `count * longest` tokens, a packed one the sum of its lengths. `encode` runs chunk after chunk;
training deals the chunks of a global batch over ranks.
"""

from __future__ import annotations

import numpy as np


def token_budget_chunks(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut texts into chunks of similar length, longest first.

    Sorted by (length, index) and cut greedily, which gives the fewest chunks that a budget allows.

    Args:
        lengths: [N] tokens of each text.
        budget: most tokens of a chunk, padding included; a single longer text is a chunk of its own.

    Returns:
        Non-empty int64 index arrays, each text in exactly one. The largest chunk's memory is needed first.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    chunks, start = [], 0
    while start < len(order):
        size = max(1, budget // max(1, int(lengths[order[start]])))
        chunks.append(order[start : start + size])
        start += size
    return chunks


def packed_chunks(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Like `token_budget_chunks` for packed rows: the sum of a chunk's lengths is within the budget.

    Args:
        lengths: [N] tokens of each text, at least 1.
        budget: most tokens of a chunk; a single longer text is a chunk of its own.

    Returns:
        Non-empty int64 index arrays, each text in exactly one, longest texts first; equal lengths are neighbours.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    ends = np.cumsum(lengths[order])
    chunks, start, before = [], 0, 0
    while start < len(order):
        stop = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        chunks.append(order[start:stop])
        start, before = stop, int(ends[stop - 1])
    return chunks


def plan_chunks(lengths: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
    """Divide a global batch over ranks: chunks within the budget, ranks balanced by tokens, equally many chunks each.

    The number of chunks per rank is the least the budget allows. With that number fixed, the budget is lowered as far
    as it goes, so that all chunks cost about the same; then they are dealt, each round's largest to the rank with the
    least so far. A pure function, so every rank computes the same plan.

    Args:
        lengths: [T] tokens of each text of the global batch; 0 where a text is absent: it is in no chunk.
        budget: most tokens of a chunk, padding included.
        world_size: W.

    Returns:
        [W] lists of the same length (at least 1) of int64 index arrays; an empty array pads.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    present = np.flatnonzero(lengths > 0)
    present_lengths = lengths[present]
    rounds = max(1, -(-len(token_budget_chunks(present_lengths, budget)) // world_size))
    chunks = _level_chunks(present_lengths, budget, rounds * world_size)
    costs = [len(chunk) * int(present_lengths[chunk].max()) for chunk in chunks]
    by_cost = sorted(range(len(chunks)), key=lambda index: (-costs[index], index))
    plan: list[list[np.ndarray]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for start in range(0, rounds * world_size, world_size):
        for place, rank in enumerate(sorted(range(world_size), key=lambda rank: (loads[rank], rank))):
            if start + place < len(by_cost):
                index = by_cost[start + place]
                plan[rank].append(present[chunks[index]])
                loads[rank] += costs[index]
            else:
                plan[rank].append(np.empty(0, dtype=np.int64))
    return plan


def _level_chunks(lengths: np.ndarray, budget: int, most: int) -> list[np.ndarray]:
    """At most `most` chunks with the smallest largest cost (their number falls as the budget grows: bisection)."""
    if not len(lengths):
        return []
    low, high = 1, max(budget, int(lengths.max()))
    while low < high:
        middle = (low + high) // 2
        if len(token_budget_chunks(lengths, middle)) <= most:
            high = middle
        else:
            low = middle + 1
    return token_budget_chunks(lengths, high)
