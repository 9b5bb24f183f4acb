"""`type: kuberay`: a RayJob, applied with kubectl. The recipe travels as a ConfigMap, the code in the image."""

from __future__ import annotations

import json
import re
import shlex
import time
from typing import Any

from nvembed.core.steps import RECIPE
from nvembed.jobs.backend import (
    FAILED,
    PENDING,
    RUNNING,
    STOPPED,
    SUCCEEDED,
    JobState,
    Preview,
    Say,
    ToolError,
    as_yaml,
    next_try,
    refuse_if_alive,
    retry_tool,
    run_tool,
    without_log,
)
from nvembed.jobs.command import Job
from nvembed.jobs.config import KubeRayTarget
from nvembed.jobs.kuberay.pods import JOB_LABEL, RECIPE_FILE, head_template, submitter_template, worker_template
from nvembed.jobs.target import object_store_bytes
from nvembed.recipe.schema import resolved_yaml

HINT = "Install kubectl, and see that `kubectl get rayjobs` works (KubeRay 1.5.1 or newer on the cluster)."
SUBMITTER_RETRIES = 0  # of the pod that submits; a retry of the run is a new cluster (backoffLimit)
_STATUS = {
    "PENDING": PENDING,
    "RUNNING": RUNNING,
    "STOPPED": STOPPED,
    "SUCCEEDED": SUCCEEDED,
    "FAILED": FAILED,
}
_SUSPENDED = ("Suspending", "Suspended")
_OVER = {"Complete": SUCCEEDED, "Failed": FAILED, "ValidationFailed": FAILED}


def render_manifests(target: KubeRayTarget, job: Job, name: str) -> list[dict[str, Any]]:
    """The ConfigMap with the resolved recipe, and the RayJob. Pure; holds no secret, only names of Secrets."""
    recipe = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": target.namespace, "labels": _labels(job)},
        "data": {RECIPE: resolved_yaml(job.recipe)},
    }
    return [recipe, render_ray_job(target, job, name)]


def render_ray_job(target: KubeRayTarget, job: Job, name: str) -> dict[str, Any]:
    """The RayJob alone. Pure."""
    gang = target.gang
    labels = _labels(job)
    if gang is not None and gang.type == "kueue":
        labels["kueue.x-k8s.io/queue-name"] = gang.queue
        if gang.priority_class:
            labels["kueue.x-k8s.io/priority-class"] = gang.priority_class
    elif gang is not None:
        labels["ray.io/scheduler-name"] = "volcano"
        if gang.queue:
            labels["volcano.sh/queue-name"] = gang.queue
        if gang.priority_class:
            labels["ray.io/priority-class-name"] = gang.priority_class
    command = job.with_resolved_recipe(RECIPE_FILE, f"{target.code_dir.rstrip('/')}/{job.script}")
    spec: dict[str, Any] = {
        "jobId": name,
        "entrypoint": shlex.join(command),
        "entrypointNumCpus": 0,
        "entrypointNumGpus": 0,
        "metadata": job.metadata,
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": SUBMITTER_RETRIES},
        "submitterPodTemplate": submitter_template(target, name),
        "backoffLimit": target.retries,  # each in a new cluster; the same --out resumes where the last one stopped
        "activeDeadlineSeconds": round(target.deadline_hours * 3600),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": target.ttl_seconds,
        "rayClusterSpec": _cluster(target, name),
    }
    if gang is not None and gang.type == "kueue":
        spec["suspend"] = True  # Kueue removes it when the whole gang fits
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "namespace": target.namespace,
            "labels": labels,
            "annotations": {f"nvembed.io/{key.replace('_', '-')}": value for key, value in job.metadata.items()},
        },
        "spec": spec,
    }


def _labels(job: Job) -> dict[str, str]:
    return {JOB_LABEL: job.base}


def _cluster(target: KubeRayTarget, name: str) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "rayVersion": target.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": target.autoscaling,
        "headGroupSpec": {
            "serviceType": "ClusterIP",  # the dashboard is reached by port-forward only
            "rayStartParams": {
                "num-cpus": "0",
                "num-gpus": "0",
                "dashboard-host": "0.0.0.0",
                "object-store-memory": str(object_store_bytes(target.head.shm)),
            },
            "template": head_template(target, name),
        },
        "workerGroupSpecs": [],
    }
    if target.autoscaling:
        cluster["autoscalerOptions"] = {"idleTimeoutSeconds": target.idle_seconds, "upscalingMode": "Default"}
    for group in target.workers:
        lowest = group.min_workers if target.autoscaling else group.max_workers
        cluster["workerGroupSpecs"].append(
            {
                "groupName": group.name,
                "replicas": lowest,
                "minReplicas": lowest,
                "maxReplicas": group.max_workers,
                "rayStartParams": {
                    "num-gpus": str(group.gpus),
                    "object-store-memory": str(object_store_bytes(group.shm)),
                },
                "template": worker_template(target, group, name),
            }
        )
    return cluster


class KubeRayBackend:
    """RayJobs of a namespace."""

    def __init__(self, target: KubeRayTarget) -> None:
        self._target = target

    def preview(self, job: Job) -> Preview:
        """The manifests, as `kubectl apply -f -` takes them."""
        manifests = render_manifests(self._target, job, f"{job.base}-1")
        return Preview({"type": "kuberay", "manifests": manifests}, as_yaml(*manifests))

    def submit(self, job: Job, say: Say) -> str:
        """`kubectl apply`."""
        states = self.states()
        refuse_if_alive(job, states)
        name = next_try(job.base, states)
        text = as_yaml(*render_manifests(self._target, job, name))
        self._kubectl("apply", "-f", "-", stdin=text)
        say(f"{name}: applied in namespace {self._target.namespace}")
        try:
            self._give_recipe_to(name)
        except ToolError as error:  # the job runs nevertheless
            say(f"note: delete configmap/{name} yourself when rayjob/{name} is deleted ({str(error).splitlines()[0]})")
        return name

    def _give_recipe_to(self, name: str) -> None:
        """Make the RayJob the owner of its ConfigMap, so that deleting the one deletes both."""
        uid = self._kubectl("get", f"rayjob/{name}", "-o", "jsonpath={.metadata.uid}").strip()
        if not uid:
            raise ToolError("kubectl returned no uid for it")
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": name, "uid": uid}
        patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
        self._kubectl("patch", f"configmap/{name}", "--type=merge", f"--patch={patch}")

    def follow(self, job_id: str, write: Say, say: Say) -> int:
        """The log until the RayJob has ended, retries included."""
        shown = message = ""
        while True:
            state = retry_tool(lambda: self._state(job_id), job_id, say)
            if text := self.logs(job_id):  # empty: not there yet, gone, or not available now
                start = len(shown) if text.startswith(shown) else 0  # a retry has a log of its own
                write(text[start:])
                shown = text
            if not state.alive:
                code = {SUCCEEDED: 0, STOPPED: 130}.get(state.state, state.exit_code or 4)
                say(f"{job_id}: {state.state}, exit code {code} {state.message}".rstrip())
                return code
            if state.message != message:
                message = state.message
                say(f"{job_id}: {state.state} {message}".rstrip())
            time.sleep(5)

    def _state(self, job_id: str) -> JobState:
        answer = self._kubectl("get", "rayjob", job_id, "--ignore-not-found", "-o", "json")
        if not answer.strip():
            return JobState(job_id, STOPPED, "deleted")
        return _state(json.loads(answer))

    def states(self) -> list[JobState]:
        """RayJobs with our label."""
        items = json.loads(self._kubectl("get", "rayjobs", "-l", JOB_LABEL, "-o", "json"))["items"]
        return [_state(item) for item in sorted(items, key=lambda item: item["metadata"].get("creationTimestamp", ""))]

    def logs(self, job_id: str) -> str:
        """The output of the submitter's pod, which is the driver's log; empty before it exists."""
        try:
            return self._kubectl("logs", f"job/{job_id}", "--tail=-1")
        except ToolError:
            return ""

    def stop(self, job_id: str) -> None:
        """Delete the RayJob with its cluster and recipe; the output stays."""
        self._kubectl("delete", f"rayjob/{job_id}", f"configmap/{job_id}", "--ignore-not-found")

    def _kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        context = ["--context", self._target.context] if self._target.context else []
        return run_tool(["kubectl", *context, "-n", self._target.namespace, *arguments], hint=HINT, stdin=stdin)


def _state(item: dict[str, Any]) -> JobState:
    status = item.get("status") or {}
    deployment = status.get("jobDeploymentStatus", "")
    state = _STATUS.get(status.get("jobStatus", ""), PENDING)
    if deployment in _OVER:
        state = STOPPED if state == STOPPED else _OVER[deployment]  # KubeRay calls a stopped job complete
    elif deployment in _SUSPENDED:
        state = PENDING  # waits for its queue; Kueue may have preempted it
    elif state not in (PENDING, RUNNING):
        state = RUNNING  # an ended attempt that is retried; a finished one that is being taken down
    prefix = "nvembed.io/"
    notes = (item["metadata"].get("annotations") or {}).items()
    metadata = {key[len(prefix) :].replace("-", "_"): value for key, value in notes if key.startswith(prefix)}
    reason = without_log(status.get("message"))
    message = " ".join(part for part in (deployment, status.get("reason", ""), reason) if part)
    code = 0 if state == SUCCEEDED else _exit_code(reason) if state == FAILED else None
    return JobState(
        item["metadata"]["name"], state, message, status.get("startTime"), status.get("endTime"), code, metadata
    )


def _exit_code(message: str) -> int | None:
    """Ray's message says `failed with exit code N` (a signal: -N); KubeRay passes it on."""
    match = re.search(r"exit code (-?\d+)", message)
    code = int(match.group(1)) if match else None
    return 128 - code if code is not None and code < 0 else code
