"""Worker contexts, plain and of Ray Train, and the entry point of a Ray Train worker."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nvembed.core import distributed, lease
from nvembed.stream.reader import StreamReader
from nvembed.training.build import TrainingSpec
from nvembed.training.loop import train


@dataclass
class PlainContext:
    """`WorkerContext` without Ray.

    Attributes:
        lease_uri: output whose lease is checked; None: no lease.
        fence: the fencing number this run holds.
        reports: metrics of every report, for callers in the same process.
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
        """Store the metrics of a checkpoint."""
        self.reports.append(dict(metrics))

    def check_lease(self) -> None:
        """Raise LeaseLostError when another run has taken the output over."""
        if self.lease_uri is not None:
            lease.check_fence(self.lease_uri, self.fence)


@dataclass
class RayContext:
    """`WorkerContext` inside a Ray Train worker."""

    spec: TrainingSpec
    rank: int
    world_size: int
    local_rank: int

    def device(self) -> torch.device:
        """The GPU Ray gave this worker, or the CPU."""
        import ray.train.torch

        return ray.train.torch.get_device() if self.spec.config.gpus_per_worker else torch.device("cpu")

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Barrier of all workers; Ray keeps no checkpoint of ours (our own scan decides where a run resumes)."""
        import ray.train

        ray.train.report(dict(metrics))

    def check_lease(self) -> None:
        """Raise LeaseLostError when another run has taken the output over."""
        if self.spec.lease_uri is not None:
            lease.check_fence(self.spec.lease_uri, self.spec.fence)


def run_worker(settings: Mapping[str, TrainingSpec]) -> None:
    """Entry point of a worker process."""
    import ray.train

    spec = settings["spec"]
    ray_context = ray.train.get_context()
    context = RayContext(spec, ray_context.get_world_rank(), ray_context.get_world_size(), ray_context.get_local_rank())
    _log_to_stderr(context.rank)
    stream = StreamReader(spec.stream_uri)
    try:
        train(spec, stream, context)
    finally:
        stream.close()


def _log_to_stderr(rank: int) -> None:
    """Send our own messages to the worker's log of Ray; drop Ray's about reports and torch's about DeepSpeed."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s"))
    ours = logging.getLogger("nvembed")
    ours.setLevel(logging.INFO)
    ours.handlers[:] = [handler]
    ours.propagate = False
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
