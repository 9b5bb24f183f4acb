"""Division of a global batch over the ranks, and the gathering of their embeddings.

Shapes: T texts of the global batch (absent ones included), S texts present, N texts of this rank, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from nvembed.core.distributed import all_gather_with_grad
from nvembed.text.batching import plan_chunks
from nvembed.types import Batch

Chunk = list[np.ndarray]


@dataclass(frozen=True)
class Sharding:
    """One rank's view of a global batch.

    A *chunk* is the part whose graph is in memory at one time: at most the token budget. It is embedded in *slices* of
    similar length, which saves padding.

    Attributes:
        batch: the whole global batch, the same on every rank.
        rank: this rank.
        chunks: `[rank][chunk][slice]` arrays of text indices; every rank has equally many chunks and slices, empty
            ones pad.
    """

    batch: Batch
    rank: int
    chunks: list[list[Chunk]]

    @property
    def world_size(self) -> int:
        """Number of ranks the batch is divided over."""
        return len(self.chunks)

    @property
    def own_chunks(self) -> list[Chunk]:
        """Text indices of this rank's chunks, in the order in which it embeds them."""
        return self.chunks[self.rank]

    @property
    def counts(self) -> list[int]:
        """Texts of each rank."""
        return [sum(len(part) for chunk in chunks for part in chunk) for chunks in self.chunks]

    @property
    def rows(self) -> slice:
        """Examples whose losses this rank computes."""
        size = self.batch.batch_size
        return slice(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 [S], the text index of every gathered row."""
        parts = [part for chunks in self.chunks for chunk in chunks for part in chunk]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def gather(self, local_ND: torch.Tensor) -> torch.Tensor:
        """Embeddings of all ranks in the order of `batch.texts`, with gradient; absent texts are zero rows.

        Returns:
            [T, D].
        """
        gathered_SD = all_gather_with_grad(local_ND, self.counts)
        texts_TD = gathered_SD.new_zeros((len(self.batch.texts), gathered_SD.shape[1]))
        return texts_TD.index_copy(0, self.order.to(gathered_SD.device), gathered_SD)


def shard(batch: Batch, token_budget: int, rank: int, world_size: int, *, slice_budget: int | None = None) -> Sharding:
    """Cut a global batch into chunks and deal them to the ranks.

    A pure function of the batch: ranks agree without communication.

    Args:
        batch: the whole global batch.
        token_budget: tokens of a chunk, padding included.
        rank: this rank.
        world_size: number of ranks.
        slice_budget: tokens of a slice, padding included; None: one forward for as much as the budget holds.
    """
    lengths = batch.token_lengths
    slices = plan_chunks(lengths, min(token_budget, slice_budget or token_budget), world_size)
    padded = [[len(part) * int(lengths[part].max()) if len(part) else 0 for part in own] for own in slices]
    starts, chunk_tokens = [0], 0
    for index, tokens in enumerate(max(column) for column in zip(*padded, strict=True)):
        if chunk_tokens and chunk_tokens + tokens > token_budget:
            starts.append(index)
            chunk_tokens = 0
        chunk_tokens += tokens
    ends = [*starts[1:], len(slices[0])]
    chunks = [[own[start:end] for start, end in zip(starts, ends, strict=True)] for own in slices]
    return Sharding(batch, rank, chunks)
