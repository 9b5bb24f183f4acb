"""The pods of a RayJob: sizes, placement, volumes, secrets by reference, the storage check before Ray starts."""

from __future__ import annotations

from typing import Any

from nvembed.core.steps import RECIPE
from nvembed.jobs.config import KubeRayTarget, Pod, WorkerGroup

JOB_LABEL = "nvembed.io/job"
CONTAINER = "ray"
SUBMITTER = "ray-job-submitter"  # KubeRay's own name for it
SUBMITTER_SIZE = {"cpu": "500m", "memory": "1Gi"}  # `ray job submit`, which then follows the log
RECIPE_DIR = "/etc/nvembed"
RECIPE_FILE = f"{RECIPE_DIR}/{RECIPE}"

# Write, rename, list and remove below the storage, on the node itself, before Ray starts there.
CHECK_FILES = """\
set -eu
probe="$NVEMBED_STORAGE/.nvembed-probe-$HOSTNAME"
mkdir -p "$probe"
echo probe > "$probe/written"
mv "$probe/written" "$probe/renamed"
ls "$probe" | grep -qx renamed
rm -r "$probe"
echo "storage $NVEMBED_STORAGE: write, rename, list and remove work on $HOSTNAME"
"""
CHECK_BUCKET = """\
import os, socket
from nvembed.core import storage
probe = storage.join(os.environ["NVEMBED_STORAGE"], ".nvembed-probe-" + socket.gethostname())
storage.write_bytes(storage.join(probe, "written"), b"probe")
assert storage.list_directory(probe) == ["written"], "what was written is not listed"
storage.remove(probe)
print("storage", os.environ["NVEMBED_STORAGE"], "write, list and remove work")
"""


def head_template(target: KubeRayTarget, name: str) -> dict[str, Any]:
    """The head's pod: never on spot nodes, as its loss ends the run."""
    template = _template(target, target.head, name, gpus=0, gpu_resource="")
    template["spec"] |= _not_on_spot(target)
    return template


def submitter_template(target: KubeRayTarget, name: str) -> dict[str, Any]:
    """The pod that submits and follows the log: the same image, no secrets, account or volumes; placed as the head is.

    KubeRay adds the command, the address and the cluster's token. Its loss ends the run as the head's does.
    """
    container = {
        "name": SUBMITTER,
        "image": target.image,
        "resources": {"requests": dict(SUBMITTER_SIZE), "limits": dict(SUBMITTER_SIZE)},
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        "securityContext": _confined(),
    }
    spec = {"restartPolicy": "Never", "automountServiceAccountToken": False, "containers": [container]}
    spec |= _identity(target) | _placement(target.head) | _not_on_spot(target)
    return {"metadata": {"labels": {JOB_LABEL: name}}, "spec": spec}


def _not_on_spot(target: KubeRayTarget) -> dict[str, Any]:
    """Affinity that excludes spot nodes."""
    away = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in sorted(target.spot_labels.items())]
    if not away:
        return {}
    terms = {"nodeSelectorTerms": [{"matchExpressions": away}]}
    return {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}}


def worker_template(target: KubeRayTarget, group: WorkerGroup, name: str) -> dict[str, Any]:
    """A worker's pod with its accelerators."""
    return _template(target, group, name, gpus=group.gpus, gpu_resource=group.gpu_resource)


def _template(target: KubeRayTarget, pod: Pod, name: str, *, gpus: int, gpu_resource: str) -> dict[str, Any]:
    sizes: dict[str, str] = {"cpu": pod.cpu, "memory": pod.memory} | ({gpu_resource: str(gpus)} if gpus else {})
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": target.image,
        "resources": {"requests": sizes, "limits": sizes},
        "env": _environment(target),
        "volumeMounts": _mounts(target),
        "securityContext": _confined(),
    }
    if target.secrets_from:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in target.secrets_from]
    small = {size: {"cpu": "100m", "memory": "512Mi"} for size in ("requests", "limits")}
    check = container | {"name": "storage-check", "command": _check(target), "resources": small}
    if target.storage.type == "claim":  # a mount needs no secret
        check = {name: value for name, value in check.items() if name != "envFrom"}
        check["env"] = [variable for variable in container["env"] if variable["name"] == "NVEMBED_STORAGE"]
    spec: dict[str, Any] = {
        "initContainers": [check],
        "containers": [container],
        "volumes": _volumes(target, pod, name),
        **_identity(target),
        **_placement(pod),
    }
    if target.service_account:
        spec["serviceAccountName"] = target.service_account
    spec["securityContext"] |= {
        "fsGroup": target.run_as_user,
        # not a chown of every file of the shared volume at each start of a pod
        "fsGroupChangePolicy": "OnRootMismatch",
    }
    return {"metadata": {"labels": {JOB_LABEL: name}}, "spec": spec}


def _identity(target: KubeRayTarget) -> dict[str, Any]:
    """User of a pod, and secrets to pull its image."""
    spec: dict[str, Any] = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": target.run_as_user,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
    }
    if target.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in target.image_pull_secrets]
    return spec


def _placement(pod: Pod) -> dict[str, Any]:
    spec: dict[str, Any] = {"nodeSelector": dict(pod.node_selector)} if pod.node_selector else {}
    if pod.tolerations:
        spec["tolerations"] = [toleration.model_dump(exclude_none=True) for toleration in pod.tolerations]
    return spec


def _confined() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _check(target: KubeRayTarget) -> list[str]:
    return ["sh", "-c", CHECK_FILES] if target.storage.type == "claim" else ["python", "-c", CHECK_BUCKET]


def _environment(target: KubeRayTarget) -> list[dict[str, Any]]:
    where = target.storage.mount_path if target.storage.type == "claim" else target.storage.uri
    plain = {"NVEMBED_STORAGE": where, "RAY_USAGE_STATS_ENABLED": "0", **target.env_vars}
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in plain.items()]
    for name, secret in target.secrets.items():
        variables.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret.secret, "key": secret.key}}})
    return variables


def _volumes(target: KubeRayTarget, pod: Pod, name: str) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": pod.shm}},
        {"name": "recipe", "configMap": {"name": name}},
    ]
    if target.storage.type == "claim":
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": target.storage.claim}})
    return volumes


def _mounts(target: KubeRayTarget) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "recipe", "mountPath": RECIPE_DIR, "readOnly": True},
    ]
    if target.storage.type == "claim":
        mounts.append({"name": "storage", "mountPath": target.storage.mount_path})
    return mounts
