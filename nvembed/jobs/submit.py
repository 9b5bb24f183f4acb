"""Submission: the backend of a target, and the pipeline's own dry run on this machine.

Apart from `backend.py`, which every backend imports, since this module imports every backend.
"""

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

ERRORS: dict[int, type[Exception]] = {2: UserError, 3: PreflightError}  # by a pipeline's exit code


def open_backend(target: Target) -> Backend:
    """The backend of a target; connects to nothing."""
    if isinstance(target, RayTarget):
        return RayBackend(target)
    if isinstance(target, KubeRayTarget):
        return KubeRayBackend(target)
    if isinstance(target, CloudTarget):
        return CloudBackend(target)
    return SlurmBackend(target)


def rehearse(job: Job, *, as_json: bool) -> str:
    """The output of the pipeline's own `--dry-run` on this machine; touches nothing.

    Args:
        job: the job to submit.
        as_json: the machine-readable form.

    Returns:
        The resolved recipe with its sources, the batch arithmetic, DeepSpeed's configuration, the steps to run, resume
        or skip.

    Raises:
        UserError, PreflightError: the pipeline would end with 2 or 3 before its first step.
        RuntimeError: it ended with another code.
    """
    command = [sys.executable, *job.argv[1:], "--dry-run", *(["--json"] if as_json else [])]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=job.folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr.strip() or done.stdout.strip()).removeprefix("error: ")
        kind = ERRORS.get(done.returncode, RuntimeError)
        raise kind(f"{job.script} would end with {done.returncode}: {message or 'no message'}")
    return done.stdout
