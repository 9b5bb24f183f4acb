"""The preflight of a run: this machine, then the cluster that RAY_ADDRESS names.

All problems are reported at once. It runs before every attempt: the nodes of a resumed attempt are often others, and it
takes seconds.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from nvembed.core import storage
from nvembed.core.secrets import why_refused
from nvembed.preflight import probe
from nvembed.preflight.cluster import cluster_findings, model_fix, unpinned
from nvembed.preflight.findings import NOTE, OK, PROBLEM, Finding, PreflightError, as_text
from nvembed.preflight.needs import Needs, lacking_packages, needs_of, pip_line
from nvembed.recipe.schema import Recipe
from nvembed.types import UserError

SCRATCH = ".preflight"
LOW_DISK, NO_DISK = 5 * 2**30, 2**29
CONNECT_SECONDS = 5.0


def examine(recipe: Recipe, out: str) -> list[Finding]:
    """All findings before the first step; connects to the cluster at RAY_ADDRESS, if it is set.

    Args:
        recipe: the recipe of the run.
        out: output root, absolute.
    """
    needs = needs_of(recipe)
    address = os.environ.get("RAY_ADDRESS", "")
    findings = [*_packages(recipe), *_sources(needs), *_output(out), *_addresses()]
    if not address:
        return [*findings, *_own_shared_memory(recipe), *_own_gpus(needs)]
    refused = list(_unreachable(address))
    return [*findings, *(refused or _cluster(needs, out))]


def on_cluster() -> bool:
    """Whether the run joins a cluster, instead of starting a private one."""
    return bool(os.environ.get("RAY_ADDRESS"))


def check_ready(recipe: Recipe, out: str) -> list[Finding]:
    """The notes of `examine`.

    Raises:
        PreflightError: there are problems; the message has all of them with their fixes.
    """
    findings = examine(recipe, out)
    problems = [finding for finding in findings if finding.state == PROBLEM]
    if problems:
        raise PreflightError(f"not ready ({len(problems)} of {len(findings)} checks):\n{as_text(problems)}")
    return [finding for finding in findings if finding.state == NOTE]


def check_reachable(out: str) -> None:
    """Check the address of the output.

    Raises:
        UserError: it carries a secret.
        PreflightError: its storage cannot be reached.
    """
    if why := why_refused(out):
        raise UserError(f"--out: {why}.")
    try:
        storage.exists(out)
    except UserError:
        raise
    except Exception as error:  # every storage has errors of its own: no package, no credentials, no host, no bucket
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise PreflightError(
            f"{out} cannot be reached ({type(error).__name__}: {' '.join(lines)[:300]}). Install the package for "
            "its storage (s3fs, gcsfs, ...), set credentials and endpoint in the environment, or choose another --out."
        ) from error


# -- this machine -----------------------------------------------------------------------------------------------------


def _packages(recipe: Recipe) -> Iterator[Finding]:
    missing = lacking_packages(recipe)
    if missing:
        listed = ", ".join(f"{name} (for {', '.join(wants)})" for name, wants in missing.items())
        yield Finding("packages", PROBLEM, f"{listed} not installed", pip_line(missing))
    else:
        yield Finding("packages", OK, "every package that the recipe needs is installed")


def _sources(needs: Needs) -> Iterator[Finding]:
    for section, uri in needs.driver_paths:
        answer = probe.model_state(uri, None) if "://" in uri else "ok" if _there(uri) else "not there"
        fix = "check the path, the mount and the credentials (environment)"
        yield Finding(section, OK if answer == "ok" else PROBLEM, f"{uri}: {answer}", "" if answer == "ok" else fix)
    for section, name, revision in needs.driver_models:
        yield from unpinned(section, name, revision)
        answer = probe.model_state(name, revision)
        state = OK if answer == "ok" else PROBLEM
        yield Finding(f"model {section}", state, f"{name}: {answer}", "" if answer == "ok" else model_fix(name))


def _there(path: str) -> bool:
    return any(Path().glob(path)) if "*" in path and not os.path.isabs(path) else storage.exists(path) or "*" in path


def _output(out: str) -> Iterator[Finding]:
    scratch = storage.join(out, f"{SCRATCH}-{uuid.uuid4().hex[:8]}")
    try:
        answer = probe.try_storage(scratch, "driver")
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    finally:
        _clear(scratch)
    fix = "" if answer == "ok" else "choose another --out, or correct permissions, mount or credentials (environment)"
    yield Finding("output", OK if answer == "ok" else PROBLEM, f"{out}: {answer}", fix)
    if answer == "ok" and storage.is_local(out):
        place = storage.local_path(out)
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        state = PROBLEM if free < NO_DISK else NOTE if free < LOW_DISK else OK
        fix = "" if state == OK else "free some, or choose --out on a larger disk"
        yield Finding("disk", state, f"{free / 2**30:.1f} GiB free at {out}", fix)


def _clear(scratch: str) -> None:
    try:
        probe.clear(scratch)
    except OSError:  # what could not be written need not be removed
        return


def _own_shared_memory(recipe: Recipe) -> Iterator[Finding]:
    wanted = recipe.cluster.object_store_mb * 2**20
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        yield Finding("/dev/shm", NOTE, "not there", "Ray keeps its objects on disk then, which is slow")
        return
    fix = "docker run --shm-size=1g, or lower cluster.object_store_mb: Ray keeps its objects on disk otherwise"
    low = free < wanted
    message = f"{free / 2**20:.0f} MiB free for an object store of {wanted / 2**20:.0f}"
    yield Finding("/dev/shm", NOTE if low else OK, message, fix if low else "")


def _own_gpus(needs: Needs) -> Iterator[Finding]:
    wanting = [pool for pool in needs.pools if pool.gpus]
    if not wanting:
        return
    from ray._private.accelerators import get_all_accelerator_managers

    have = sum(manager.get_current_node_num_accelerators() for manager in get_all_accelerator_managers()
               if manager.get_resource_name() == "GPU")  # fmt: skip
    for pool in wanting:
        need = pool.count * pool.gpus
        if need > have:
            message = f"{pool.section} needs {need:g} GPUs, this machine has {have:g}"
            fix = "set RAY_ADDRESS to a cluster that has them (nvembed submit), or its gpus_per_* to 0"
            yield Finding("room", PROBLEM, message, fix)


# -- the cluster ------------------------------------------------------------------------------------------------------


def _addresses() -> Iterator[Finding]:
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        state = PROBLEM if os.environ.get("RAY_ADDRESS") else NOTE
        fix = "unset RAY_AUTH_MODE: Ray listens on every interface, and anyone who reaches it can run code here"
        yield Finding("authentication", state, "disabled by RAY_AUTH_MODE", fix)


def _unreachable(address: str) -> Iterator[Finding]:
    """The reason why the cluster cannot be joined; nothing after joining it."""
    if address.startswith("ray://"):
        fix = "run the pipeline on the cluster instead: nvembed submit TARGET -- python PIPELINE RECIPE"
        yield Finding("cluster", PROBLEM, f"{address} is Ray Client, which Ray Train cannot use", fix)
        return
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            fix = "is the cluster up, and RAY_ADDRESS right? (`ray status` there)"
            yield Finding("cluster", PROBLEM, f"{address} cannot be reached: {error}", fix)
            return
    try:
        _join()
    except Exception as error:  # Ray raises RuntimeError, ConnectionError and errors of its own for the same mistakes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = f"{address} cannot be joined: {type(error).__name__}: {' '.join(lines)[:600]}"
        fix = "the driver needs the cluster's Python and Ray versions and its token (RAY_AUTH_MODE, RAY_AUTH_TOKEN)"
        yield Finding("cluster", PROBLEM, message, fix)


def _join() -> None:
    import ray  # noqa: F401  (its loggers exist from here on)

    from nvembed.core.ray_cluster import ensure_ray
    from nvembed.core.terminal import adopt_loggers

    adopt_loggers("ray")
    ensure_ray()


def _cluster(needs: Needs, out: str) -> list[Finding]:
    from nvembed.preflight.facts import gather

    scratch = storage.join(out, f"{SCRATCH}-{uuid.uuid4().hex[:8]}")
    order = {
        "packages": sorted(needs.node_packages),
        "models": [{"name": name, "revision": revision} for _, name, revision in needs.node_models],
        "scratch": scratch,
    }
    try:
        cluster = gather(order, probe.listed)
    finally:
        _clear(scratch)
    driver = {"versions": probe.versions(), "source": probe.source_hash()}
    return cluster_findings(cluster, needs, driver, out)
