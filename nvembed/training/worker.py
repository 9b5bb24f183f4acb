"""What one Ray Train worker does: the loop, with Ray behind its context."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nvembed.core import lease
from nvembed.stream.reader import StreamReader
from nvembed.training.build import Job
from nvembed.training.loop import train


@dataclass
class RayContext:
    """`WorkerContext` inside a Ray Train worker."""

    job: Job
    rank: int
    world_size: int
    local_rank: int

    def device(self) -> torch.device:
        """The GPU Ray gave this worker, or the CPU."""
        import ray.train.torch

        return ray.train.torch.get_device() if self.job.config.gpus_per_worker else torch.device("cpu")

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Barrier of all workers; Ray keeps no checkpoint of ours (our own scan decides where a run resumes)."""
        import ray.train

        ray.train.report(dict(metrics))

    def check_lease(self) -> None:
        """Raise LeaseLostError when another run has taken the output over."""
        if self.job.lease_uri is not None:
            lease.check_fence(self.job.lease_uri, self.job.fence)


def run_worker(settings: Mapping[str, Job]) -> None:
    """Entry point of a worker process."""
    import ray.train

    job = settings["job"]
    ray_context = ray.train.get_context()
    context = RayContext(job, ray_context.get_world_rank(), ray_context.get_world_size(), ray_context.get_local_rank())
    _log_to_stderr(context.rank)
    stream = StreamReader(job.stream_uri)
    try:
        train(job, stream, context)
    finally:
        stream.close()


def _log_to_stderr(rank: int) -> None:
    """Our own messages go where Ray keeps a worker's lines; not Ray's about reports, nor torch's about DeepSpeed."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s"))
    ours = logging.getLogger("nvembed")
    ours.setLevel(logging.INFO)
    ours.handlers[:] = [handler]
    ours.propagate = False
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
