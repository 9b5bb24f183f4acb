"""The plain worker context: one process, or ranks of a process group somebody else started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nvembed.core import distributed, lease


@dataclass
class PlainContext:
    """`WorkerContext` without Ray.

    Attributes:
        lease_uri: output whose lease is checked; None: no lease.
        fence: the fencing number this run holds.
        reports: what was reported, for callers in the same process.
    """

    lease_uri: str | None = None
    fence: int = 0
    rank: int = field(default_factory=distributed.rank)
    world_size: int = field(default_factory=distributed.world_size)
    local_rank: int = 0
    reports: list[dict[str, Any]] = field(default_factory=list)

    def device(self) -> torch.device:
        """CPU; the GPU of this rank where there is one."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Remember a checkpoint's metrics."""
        self.reports.append(dict(metrics))

    def check_lease(self) -> None:
        """Raise LeaseLostError when another run has taken the output over."""
        if self.lease_uri is not None:
            lease.check_fence(self.lease_uri, self.fence)
