"""Reading and checking a target: all problems at once, each with its line, as for recipes; sizes in its values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from nvembed.core.arguments import nearest
from nvembed.jobs.config import CloudTarget, KubeRayTarget, RayTarget, SlurmTarget
from nvembed.jobs.uploads import leaks, wrong_variables
from nvembed.recipe.document import Document, Path, Problem, parse
from nvembed.recipe.schema import RecipeError, read_yaml
from nvembed.recipe.validation import validate

Target = RayTarget | KubeRayTarget | SlurmTarget | CloudTarget
KINDS: dict[str, type[Target]] = {
    "ray": RayTarget,
    "kuberay": KubeRayTarget,
    "slurm": SlurmTarget,
    "cloud": CloudTarget,
}
LEFT_BYTES = 2**30  # memory of a pod beside /dev/shm: Ray and one worker
SHARE = 0.9  # of /dev/shm; Ray keeps a little beside its store
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def load_target(path: str) -> Target:
    """Read and check a target.

    Raises:
        RecipeError: all problems, each with its line.
        UserError: there is no such file.
    """
    document, problems = parse(read_yaml(path, "target"), path, "target")
    if problems and not document.data:
        raise RecipeError(path, problems)
    kind = document.data.get("type")
    if kind not in KINDS:
        hint = nearest(str(kind), list(KINDS))
        reason = "missing;" if kind is None else f"{kind!r}:"
        where = ("type",)
        raise RecipeError(
            path, [*problems, Problem(document.position(where), where, f"{reason} allowed: {', '.join(KINDS)}.{hint}")]
        )
    model = KINDS[str(kind)]
    problems += validate(model, document)[1]
    problems += _secrets(document)
    if not problems:
        target = model.model_validate(document.data)
        problems += _CHECKS[str(kind)](target, document)
        if not problems:
            return target
    raise RecipeError(path, problems)


def is_loopback(address: str) -> bool:
    """Whether an http address is one of this machine."""
    return urlsplit(address).hostname in LOOPBACK


def _secrets(document: Document) -> list[Problem]:
    given = document.data.get("env_vars")
    plain = {str(name): str(value) for name, value in given.items()} if isinstance(given, dict) else {}
    problems = []
    for name, why in wrong_variables(plain).items():
        path: Path = ("env_vars", name)
        message = f"{why}; name it under `secrets`, so that the cluster provides it"
        problems.append(Problem(document.position(path, key=True), path, message))
    rest = {key: value for key, value in document.data.items() if key != "env_vars"}
    for path, text in _texts(rest, ()):
        if secrets := leaks([text]):
            message = f"holds {' and '.join(secrets)}; others read a target. Name it under `secrets`"
            problems.append(Problem(document.position(path), path, message))
    return problems


def _texts(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(item, (*path, key))


def _check_ray(target: Any, document: Document) -> list[Problem]:
    problems = []
    if target.authentication == "token" and target.address.startswith("http://"):
        if not is_loopback(target.address) and not target.plain_http:
            message = (
                f"{target.address!r}: the token would travel unencrypted; use https, or a tunnel to 127.0.0.1, "
                "or accept it with plain_http: true"
            )
            problems.append(Problem(document.position(("address",)), ("address",), message))
    elif target.authentication == "disabled" and not is_loopback(target.address):
        message = "'disabled': anyone who reaches the address can run code; only a loopback address needs no token"
        problems.append(Problem(document.position(("authentication",)), ("authentication",), message))
    if target.outputs is not None and "://" not in target.outputs:
        problems += _below("outputs", target.outputs, target.shared_paths, document, is_loopback(target.address))
    return problems


def _below(name: str, path: str, roots: tuple[str, ...], document: Document, anywhere: bool = False) -> list[Problem]:
    if path.startswith("/") and (anywhere or any(inside(path, root) for root in roots)):
        return []
    listed = ", ".join(roots) or "shared_paths is empty"
    message = f"{path!r}: not on storage that every node sees ({listed}); use a URI or a path below one of these"
    return [Problem(document.position((name,)), (name,), message)]


def inside(path: str, root: str) -> bool:
    """Whether a path is the root or below it, `..` not followed."""
    return ".." not in path.split("/") and (path == root or path.startswith(root.rstrip("/") + "/"))


def _shm_fits(pod: Any, here: Path, document: Document) -> Iterator[Problem]:
    shm, memory = memory_bytes(pod.shm), memory_bytes(pod.memory)
    if memory - shm < LEFT_BYTES:
        message = (
            f"shm {pod.shm} is counted as memory of the pod, so {pod.memory} leaves {max(0, memory - shm) / 2**30:.2f} "
            "GiB for everything else; raise memory or lower shm"
        )
        yield Problem(document.position(here), here, message)


def _check_kuberay(target: Any, document: Document) -> list[Problem]:
    problems = list(_shm_fits(target.head, ("head",), document))
    names = [group.name for group in target.workers]
    for index, group in enumerate(target.workers):
        here: Path = ("workers", index)
        problems += _shm_fits(group, here, document)
        if group.min_workers > group.max_workers:
            message = f"min_workers {group.min_workers} is more than max_workers {group.max_workers}"
            problems.append(Problem(document.position(here), here, message))
        if names.index(group.name) != index:
            problems.append(Problem(document.position(here), (*here, "name"), f"{group.name!r}: used twice"))
    if target.gang is not None and target.autoscaling:
        message = "true: a gang is admitted whole; with `gang`, set autoscaling: false (max_workers start at once)"
        problems.append(Problem(document.position(("autoscaling",)), ("autoscaling",), message))
    if target.outputs is not None:
        root = target.storage.mount_path if target.storage.type == "claim" else target.storage.uri
        if not inside(target.outputs, root):
            message = f"{target.outputs!r}: not below the storage, {root}"
            problems.append(Problem(document.position(("outputs",)), ("outputs",), message))
    clash = sorted(set(target.secrets) & set(target.env_vars))
    problems += [
        Problem(document.position(("secrets", name)), ("secrets", name), "also in env_vars; keep one") for name in clash
    ]
    return problems


def _check_slurm(target: Any, document: Document) -> list[Problem]:
    problems = []
    if target.outputs is not None and "://" not in target.outputs and not target.outputs.startswith("/"):
        message = f"{target.outputs!r}: relative; write a path on storage that every node mounts, or a URI"
        problems.append(Problem(document.position(("outputs",)), ("outputs",), message))
    for index, option in enumerate(target.ray_options):
        if option.split("=")[0] in ("--head", "--port", "--node-ip-address", "--block"):
            path: Path = ("ray_options", index)
            message = f"{option!r}: is set by the job itself"
            problems.append(Problem(document.position(path), path, message))
    return problems


def _check_cloud(target: Any, document: Document) -> list[Problem]:
    problems = []
    scheme = {"aws": "s3://", "gcp": "gs://"}[target.provider.type]
    if not target.bucket.startswith(scheme):
        message = f"{target.bucket!r}: on {target.provider.type} a bucket begins with {scheme}"
        problems.append(Problem(document.position(("bucket",)), ("bucket",), message))
    if target.outputs is not None and not inside(target.outputs, target.mount_path):
        message = f"{target.outputs!r}: not below mount_path, {target.mount_path}"
        problems.append(Problem(document.position(("outputs",)), ("outputs",), message))
    for index, group in enumerate(target.workers):
        if group.min_workers > group.max_workers:
            here: Path = ("workers", index)
            message = f"min_workers {group.min_workers} is more than max_workers {group.max_workers}"
            problems.append(Problem(document.position(here), here, message))
    for place in target.models:
        if inside(place, target.mount_path) or ".." in place.split("/"):
            message = f"must be a folder on the machine's own disk, not below the bucket's mount, {target.mount_path}"
            problems.append(Problem(document.position(("models", place), key=True), ("models", place), message))
    return [*problems, *_cloud_secrets(target, document)]


def _cloud_secrets(target: Any, document: Document) -> Iterator[Problem]:
    aws = target.provider.type == "aws"
    for name, secret in target.secrets.items():
        here: Path = ("secrets", name)
        message = ""
        if (secret.secret is None) == (secret.parameter is None):
            message = "give one source: `secret`, or `parameter` (AWS only)"
        elif secret.parameter is not None and not aws:
            message = "`parameter` is AWS's Parameter Store; on gcp name a `secret`"
        elif secret.version != "latest" and aws:
            message = "`version` is of GCP's secrets; AWS gives the current one"
        elif name in target.env_vars:
            message = "also in env_vars; keep one"
        if message:
            yield Problem(document.position(here, key=True), here, message)


_CHECKS: dict[str, Callable[[Any, Document], list[Problem]]] = {
    "ray": _check_ray,
    "kuberay": _check_kuberay,
    "slurm": _check_slurm,
    "cloud": _check_cloud,
}


# -- sizes ------------------------------------------------------------------------------------------------------------


def quantity_bytes(text: str) -> int:
    """Bytes of "8Gi", "8G" (Kubernetes: 10^9) or "8g" (docker: 2^30).

    Raises:
        ValueError: something else.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kKmMgGtT]?)(i?)b?", text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write 8Gi or 8g")
    number, unit, binary = match.groups()
    base = 1024 if binary or unit.islower() else 1000
    return int(float(number) * base ** _POWERS[unit.lower()])


def memory_bytes(text: str) -> float:
    """Bytes of a quantity of Kubernetes, whose small letters are thousandths: "16Gi", "1.5G", "1000m", "2Pi"."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([numkKMGTPE]?)(i?)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a quantity of Kubernetes")
    number, unit, binary = match.groups()
    power = {"n": -3, "u": -2, "m": -1, "": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}[unit]
    return float(number) * (1024 if binary else 1000) ** power


def object_store_bytes(shm: str) -> int:
    """Bytes of the object store for a /dev/shm of this size."""
    return int(SHARE * quantity_bytes(shm))
