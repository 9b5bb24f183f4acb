"""The story's own `--dry-run`, run here: what a submission shows before the job itself (layer 6)."""

from __future__ import annotations

import os
import subprocess
import sys

from nvembed.jobs.command import Job
from nvembed.preflight.packages import PreflightError
from nvembed.types import UserError

ERRORS: dict[int, type[Exception]] = {2: UserError, 3: PreflightError}  # a story's exit codes; `submit` ends with them


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
