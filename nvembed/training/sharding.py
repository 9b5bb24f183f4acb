"""Who computes what of a global batch, and how the pieces come together again.

Shapes: T texts of the global batch (absent ones included), S texts present, N texts of this rank, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from nvembed.distributed import all_gather_with_grad
from nvembed.text.batching import plan_chunks
from nvembed.types import Batch


@dataclass(frozen=True)
class Sharding:
    """One rank's view of a global batch.

    Attributes:
        batch: the whole global batch, the same on every rank.
        rank: this rank.
        chunks: `[rank][chunk]` arrays of text indices; every rank has equally many, empty ones pad.
    """

    batch: Batch
    rank: int
    chunks: list[list[np.ndarray]]

    @property
    def world_size(self) -> int:
        """Number of ranks the batch is divided over."""
        return len(self.chunks)

    @property
    def own_chunks(self) -> list[np.ndarray]:
        """Text indices of this rank's chunks, in the order in which it embeds them."""
        return self.chunks[self.rank]

    @property
    def counts(self) -> list[int]:
        """Texts of each rank."""
        return [sum(len(chunk) for chunk in chunks) for chunks in self.chunks]

    @property
    def rows(self) -> slice:
        """Examples whose losses this rank computes."""
        size = self.batch.batch_size
        return slice(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 [S], the text index of every gathered row."""
        return torch.from_numpy(np.concatenate([chunk for chunks in self.chunks for chunk in chunks]).astype(np.int64))

    def gather(self, local_ND: torch.Tensor) -> torch.Tensor:
        """Embeddings of all ranks in the order of `batch.texts`, with gradient; absent texts are zero rows.

        Returns:
            [T, D].
        """
        gathered_SD = all_gather_with_grad(local_ND, self.counts)
        texts_TD = gathered_SD.new_zeros((len(self.batch.texts), gathered_SD.shape[1]))
        return texts_TD.index_copy(0, self.order.to(gathered_SD.device), gathered_SD)


def shard(batch: Batch, token_budget: int, rank: int, world_size: int) -> Sharding:
    """Cut a global batch into chunks of at most `token_budget` tokens and deal them to the ranks.

    A pure function of the batch, so no rank has to tell another what it does.
    """
    return Sharding(batch, rank, plan_chunks(batch.token_lengths, token_budget, world_size))
