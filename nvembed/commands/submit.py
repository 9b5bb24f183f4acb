"""`nvembed submit`: run a pipeline where the accelerators are.

nvembed submit cluster/ray.yaml -- python pipelines/nv_embed.py pipelines/recipes/quickstart.yaml --out /shared/runs/a
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nvembed.commands.common import AsJson, ended, show
from nvembed.commands.jobs import TargetPath, follow
from nvembed.core.terminal import Console
from nvembed.pipeline.exit_codes import ExitCode
from nvembed.types import UserError

SEEN_HERE = "# (outputs as this machine sees them; the job checks again where it runs)"
DETACH = "detaching from the job, which continues"


def submit_command(
    target: TargetPath,
    command: Annotated[
        list[str], typer.Argument(metavar="-- python PIPELINE.py RECIPE ...", help="The command, as it would run here.")
    ],
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the pipeline's dry run and the job as it would be submitted; touches nothing."
        ),
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the log, end with the job's exit code.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Submit a pipeline to a Ray cluster, KubeRay, Slurm or a cloud; the same command again resumes it."""

    def action() -> int:
        from nvembed.core.secrets import mask
        from nvembed.jobs.command import read_job
        from nvembed.jobs.submit import open_backend, rehearse
        from nvembed.jobs.target import load_target

        console = Console()
        try:
            place = load_target(target)
            job = read_job(place, command)
            backend = open_backend(place)
            preview = backend.preview(job)
            seen = rehearse(job, as_json=as_json) if dry_run else ""
        except UserError as error:  # may quote what the user wrote, and that may be a secret
            raise UserError(mask(str(error))) from None
        if dry_run:
            plan = json.loads(seen) if as_json else {}
            value = {"id": f"{job.base}-1", **plan, "out": job.out, "job": preview.value}
            text = f"{seen.rstrip()}\n{SEEN_HERE}\n\n# {target}: {job.base}-1 -> {job.out}\n{preview.text}"
            show(value, mask(text).rstrip(), as_json)
            return ExitCode.DONE
        job_id = backend.submit(job, console.line)
        if not wait:
            console.line(f"follow it: nvembed jobs logs {target} {job_id} --follow")
            show({"id": job_id, "out": job.out, **job.metadata}, job_id, as_json)
            return ExitCode.DONE
        code = follow(backend, target, job_id, console.line, quiet=as_json)
        if as_json:
            show({"id": job_id, "out": job.out, "exit_code": code, **job.metadata}, "", as_json)
        return code

    raise ended(action, DETACH if wait and not dry_run else "stopping")
