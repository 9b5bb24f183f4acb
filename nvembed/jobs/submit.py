"""Submission: the backend of a target, and the pipeline's own dry run on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

from nvembed.jobs.backend import Backend
from nvembed.jobs.cloud.backend import CloudBackend
from nvembed.jobs.command import Job
from nvembed.jobs.config import CloudTarget, KubeRayTarget, RayTarget
from nvembed.jobs.kuberay.backend import KubeRayBackend
from nvembed.jobs.ray.backend import RayBackend
from nvembed.jobs.slurm.backend import SlurmBackend
from nvembed.jobs.target import Target
from nvembed.preflight.findings import PreflightError
from nvembed.types import UserError

ERRORS: dict[int, type[Exception]] = {2: UserError, 3: PreflightError}  # a story's exit codes; `submit` ends with them


def open_backend(target: Target) -> Backend:
    """The backend of a target; nothing is contacted yet."""
    if isinstance(target, RayTarget):
        return RayBackend(target)
    if isinstance(target, KubeRayTarget):
        return KubeRayBackend(target)
    if isinstance(target, CloudTarget):
        return CloudBackend(target)
    return SlurmBackend(target)


def rehearse(job: Job, *, as_json: bool) -> str:
    """What the story would do with its recipe and output, as this machine sees them; touches nothing.

    Args:
        job: what would be submitted.
        as_json: the machine-readable form.

    Returns:
        The resolved recipe with its sources, the batch arithmetic, DeepSpeed's configuration, the steps to run, resume
        or skip.

    Raises:
        UserError, PreflightError: the story would refuse to begin, with 2 or 3.
        RuntimeError: it ended otherwise.
    """
    command = [sys.executable, *job.argv[1:], "--dry-run", *(["--json"] if as_json else [])]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=job.folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).removeprefix("error: ")
        kind = ERRORS.get(done.returncode, RuntimeError)
        raise kind(f"{job.story} would end with {done.returncode}: {said or 'it said nothing'}")
    return done.stdout
