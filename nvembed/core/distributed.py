"""Rank, world size and the gather with gradient; right with one process and no process group.

torch is imported inside the functions so that layers which only need the words stay light.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class WorkerContext(Protocol):
    """The training loop's view of its process; implemented for Ray Train and for one plain process."""

    rank: int
    world_size: int
    local_rank: int

    def device(self) -> torch.device:
        """The device this rank computes on."""
        ...

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Report a checkpoint to the launcher. A barrier: every rank calls it equally often."""
        ...

    def check_lease(self) -> None:
        """Raise LeaseLostError when another run has taken this output over (fencing)."""
        ...


def rank() -> int:
    """This process's rank; 0 without a process group."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank (JSON-like objects only)."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_with_grad(local_ND: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Concatenate every rank's rows in rank order; the gradient is summed over ranks and sliced back.

    The loss on each rank is that rank's *part* of the global loss, so the gradient of a row is the sum of what all
    ranks' parts say about it.

    Args:
        local_ND: [N, D] rows of this rank.
        counts: rows of each rank; known to all ranks beforehand (rows may differ between ranks).

    Returns:
        [sum(counts), D].
    """
    if world_size() == 1:
        return local_ND
    gathered: torch.Tensor = _all_gather_function().apply(local_ND, counts)
    return gathered


def _all_gather_function() -> Any:
    global _ALL_GATHER
    if _ALL_GATHER is None:
        import torch
        import torch.distributed as dist

        class AllGather(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, local_ND: torch.Tensor, counts: list[int]) -> torch.Tensor:
                ctx.counts = counts
                width = max(counts)
                padded_WD = local_ND.new_zeros((width, local_ND.shape[1]))
                padded_WD[: local_ND.shape[0]] = local_ND
                parts = [torch.empty_like(padded_WD) for _ in counts]
                dist.all_gather(parts, padded_WD)
                return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

            @staticmethod
            def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
                gradient_TD = gradients[0].contiguous()
                dist.all_reduce(gradient_TD)
                start = sum(ctx.counts[: dist.get_rank()])
                return gradient_TD[start : start + ctx.counts[dist.get_rank()]], None

        _ALL_GATHER = AllGather
    return _ALL_GATHER


_ALL_GATHER: Any = None
