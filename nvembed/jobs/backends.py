"""The kind of a target -> what can be done with jobs there."""

from __future__ import annotations

from nvembed.jobs.backend import Backend
from nvembed.jobs.cloud.backend import CloudBackend
from nvembed.jobs.config import CloudTarget, KubeRayTarget, RayTarget
from nvembed.jobs.kuberay.backend import KubeRayBackend
from nvembed.jobs.ray.backend import RayBackend
from nvembed.jobs.slurm.backend import SlurmBackend
from nvembed.jobs.target import Target


def open_backend(target: Target) -> Backend:
    """The backend of a target; nothing is contacted yet."""
    if isinstance(target, RayTarget):
        return RayBackend(target)
    if isinstance(target, KubeRayTarget):
        return KubeRayBackend(target)
    if isinstance(target, CloudTarget):
        return CloudBackend(target)
    return SlurmBackend(target)
