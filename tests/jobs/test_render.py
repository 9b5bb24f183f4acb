"""What is rendered: RayJobs by KubeRay's published schema, batch scripts by bash, `ray up` files by Ray's schema."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.jobs.backend import as_yaml
from nvembed.jobs.cloud.backend import render_cluster
from nvembed.jobs.command import Job
from nvembed.jobs.config import CloudTarget, KubeRayTarget, SlurmTarget
from nvembed.jobs.kuberay.backend import _state, render_manifests
from nvembed.jobs.kuberay.pods import CHECK_FILES
from nvembed.jobs.slurm.backend import render_script
from nvembed.jobs.target import load_target, memory_bytes, object_store_bytes, quantity_bytes
from nvembed.recipe.schema import load_recipe

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT.parent / "shared/data/kuberay/ray.io_rayjobs.yaml"
JOB = Job(
    "tiny", "0123456789", "python", "pipelines/quickstart.py", ("--no-auto-promote",), "", (),
    load_recipe(str(ROOT / "pipelines/recipes/tiny.yaml")), "/shared/runs/it's here", ROOT,
)  # fmt: skip


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The schema of RayJob v1 as KubeRay publishes it."""
    if not PUBLISHED.is_file():
        pytest.skip("KubeRay's published schema is not at ../shared/data/kuberay/ray.io_rayjobs.yaml")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(PUBLISHED.read_text(), Loader=loader)["spec"]["versions"]
    return dict(next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"])


def unknown_keys(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Keys the schema does not name; the API server would drop them without a word."""
    if isinstance(value, dict):
        if schema.get("x-kubernetes-preserve-unknown-fields") or path == ".metadata":
            return  # .metadata is Kubernetes' own ObjectMeta, which no schema of a resource spells out
        names, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, inner in value.items():
            if key in names:
                yield from unknown_keys(inner, names[key], f"{path}.{key}")
            elif isinstance(others, dict):
                yield from unknown_keys(inner, others, f"{path}.{key}")
            elif not others:
                yield f"{path}.{key}"
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from unknown_keys(inner, schema.get("items", {}), f"{path}.{index}")


def faults(manifest: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft7Validator(schema)
    wrong = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]
    return [*wrong, *unknown_keys(manifest, schema)]


def test_the_shipped_ray_job_fits_the_published_schema(schema: dict[str, Any]) -> None:
    target = load_target(str(ROOT / "cluster/kuberay.yaml"))
    assert isinstance(target, KubeRayTarget)
    recipe, ray_job = render_manifests(target, JOB, f"{JOB.base}-1")
    assert faults(ray_job, schema) == []
    assert yaml.safe_load(recipe["data"]["recipe.yaml"])["name"] == "tiny"
    assert list(yaml.safe_load_all(as_yaml(recipe, ray_job))) == [recipe, ray_job], "kubectl reads what was checked"
    spec = ray_job["spec"]
    assert spec["backoffLimit"] == 3 and spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] >= 60
    assert spec["entrypoint"].endswith("--out '/shared/runs/it'\"'\"'s here' --no-auto-promote")
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"} and cluster["rayVersion"] == "2.60.0"
    head, worker = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
    assert head["rayStartParams"]["num-cpus"] == "0" and head["serviceType"] == "ClusterIP"
    for group in (head, worker):  # left alone, Ray asks for more than /dev/shm has, and preflight refuses that
        shared = quantity_bytes(group["template"]["spec"]["volumes"][0]["emptyDir"]["sizeLimit"])
        assert 0.5 * shared < int(group["rayStartParams"]["object-store-memory"]) < shared
    affinity = json.dumps(head["template"]["spec"]["affinity"])
    assert affinity.count("NotIn") == 4 and "affinity" not in worker["template"]["spec"]
    assert (worker["minReplicas"], worker["maxReplicas"]) == (0, 2)
    for template in (head["template"], worker["template"]):
        pod = template["spec"]
        assert pod["volumes"][0] == {
            "name": "shm",
            "emptyDir": {"medium": "Memory", "sizeLimit": pod["volumes"][0]["emptyDir"]["sizeLimit"]},
        }
        assert pod["initContainers"][0]["name"] == "storage-check" and pod["securityContext"]["runAsNonRoot"]
        secret = next(variable for variable in pod["containers"][0]["env"] if variable["name"] == "HF_TOKEN")
        assert secret == {
            "name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "nvembed-secrets", "key": "hf-token"}}
        }  # fmt: skip
        assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch", "no chown of the whole claim"
    assert worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_the_pod_that_submits_has_what_it_needs_and_no_more(schema: dict[str, Any]) -> None:
    shipped = load_target(str(ROOT / "cluster/kuberay.yaml"))
    more = {"service_account": "writes-buckets", "secrets_from": ("all",), "image_pull_secrets": ("pull",)}
    target = shipped.model_copy(update=more)
    assert isinstance(target, KubeRayTarget)
    _, ray_job = render_manifests(target, JOB, "n")
    assert faults(ray_job, schema) == []
    head = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert "hf-token" in json.dumps(head) and head["serviceAccountName"] == "writes-buckets"
    pod = ray_job["spec"]["submitterPodTemplate"]["spec"]
    [container] = pod["containers"]
    assert container["image"] == target.image and "command" not in container, "KubeRay gives the command"
    assert pod["restartPolicy"] == "Never", "a Job takes no other; KubeRay sets it in its own template only"
    assert pod["affinity"] == head["affinity"] and pod["imagePullSecrets"] == [{"name": "pull"}]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert [variable["name"] for variable in container["env"]] == ["RAY_USAGE_STATS_ENABLED"]
    assert not {"envFrom", "volumeMounts"} & set(container) and not {"volumes", "serviceAccountName"} & set(pod)
    assert pod["automountServiceAccountToken"] is False and "nvembed-secrets" not in json.dumps(pod)


def test_the_walker_refuses_what_the_api_server_would_drop(schema: dict[str, Any]) -> None:
    target = load_target(str(ROOT / "cluster/kuberay.yaml"))
    assert isinstance(target, KubeRayTarget)
    _, ray_job = render_manifests(target, JOB, "n")
    ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["gpu"] = 1
    ray_job["spec"]["backOffLimit"] = 3
    assert faults(ray_job, schema) == [
        ".spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.gpu", ".spec.backOffLimit"
    ]  # fmt: skip
    ray_job["spec"]["backoffLimit"] = "3"
    assert any("is not of type 'integer'" in fault for fault in faults(ray_job, schema))


WORKER = st.fixed_dictionaries(
    {
        "gpus": st.integers(0, 8),
        "memory": st.just("32Gi"),
        "min_workers": st.integers(0, 2),
        "max_workers": st.integers(2, 4),
    },
    optional={
        "node_selector": st.just({"a/b": "c"}),
        "tolerations": st.lists(
            st.sampled_from([{"key": "k"}, {"key": "k", "operator": "Equal", "value": "v", "effect": "NoExecute"}])
        ),
        "shm": st.sampled_from(["64Mi", "16Gi"]),
    },
)
STORAGE = st.sampled_from(
    [{"type": "claim", "claim": "c", "mount_path": "/shared"}, {"type": "bucket", "uri": "s3://bucket/x"}]
)
OPTIONS = st.fixed_dictionaries(
    {"storage": STORAGE, "autoscaling": st.booleans(), "workers": st.lists(WORKER, min_size=1, max_size=3)},
    optional={
        "image_pull_secrets": st.just(["pull"]),
        "service_account": st.just("sa"),
        "spot_labels": st.sampled_from([{}, {"x": "y"}]),
        "secrets": st.just({"HF_TOKEN": {"secret": "s", "key": "k"}}),
        "secrets_from": st.just(["all"]),
        "env_vars": st.just({"PLAIN": "1"}),
        "gang": st.sampled_from(
            [
                {"type": "kueue", "queue": "q"},
                {"type": "kueue", "queue": "q", "priority_class": "p"},
                {"type": "volcano"},
                {"type": "volcano", "queue": "q", "priority_class": "p"},
            ]
        ),
        "retries": st.integers(0, 5),
        "deadline_hours": st.sampled_from([0.5, 48]),
    },
)


@settings(max_examples=20)
@given(options=OPTIONS)
def test_every_combination_fits_the_published_schema(schema: dict[str, Any], options: dict[str, Any]) -> None:
    for index, worker in enumerate(options["workers"]):
        worker["name"] = f"group-{index}"
    target = KubeRayTarget.model_validate({"type": "kuberay", "image": "i", **options})
    _, ray_job = render_manifests(target, JOB, "name")
    assert faults(ray_job, schema) == []
    gang = options.get("gang", {}).get("type")
    assert ray_job["spec"].get("suspend", False) is (gang == "kueue")
    assert ("ray.io/scheduler-name" in ray_job["metadata"]["labels"]) is (gang == "volcano")
    for group in ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_storage_check_of_a_pod_works_and_fails_where_it_must(tmp_path: Path) -> None:
    def check(folder: Path) -> subprocess.CompletedProcess[str]:
        environment = {"NVEMBED_STORAGE": str(folder), "HOSTNAME": "pod-1", "PATH": "/usr/bin:/bin"}
        return subprocess.run(["sh", "-c", CHECK_FILES], env=environment, capture_output=True, text=True)

    done = check(tmp_path)
    assert done.returncode == 0 and "write, rename, list and remove work on pod-1" in done.stdout
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert check(tmp_path / "file").returncode != 0


@pytest.mark.parametrize(
    ("status", "state", "code"),
    [
        ({}, "pending", None),
        ({"jobStatus": "RUNNING", "jobDeploymentStatus": "Running"}, "running", None),
        ({"jobStatus": "SUCCEEDED", "jobDeploymentStatus": "Complete"}, "succeeded", 0),
        ({"jobStatus": "FAILED", "jobDeploymentStatus": "Retrying"}, "running", None),
        (
            {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed", "message": "failed with exit code 5, last"},
            "failed",
            5,
        ),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, "failed", None),
    ],
)
def test_states_of_a_ray_job(status: dict[str, str], state: str, code: int | None) -> None:
    notes = {"nvembed.io/nvembed-fingerprint": "f", "nvembed.io/git-revision": "r", "other": "x"}
    job_state = _state({"metadata": {"name": "n", "annotations": notes}, "status": status})
    assert (job_state.state, job_state.exit_code) == (state, code)
    assert job_state.metadata == {"nvembed_fingerprint": "f", "git_revision": "r"}


# -- slurm ------------------------------------------------------------------------------------------------------------

SLURM = st.fixed_dictionaries(
    {"nodes": st.integers(1, 4), "gpus_per_node": st.integers(0, 8)},
    optional={
        "memory": st.just("500G"), "partition": st.just("gpu"), "exclusive": st.booleans(), "interface": st.just("ib0"),
        "port": st.just(6379), "setup": st.just(["module load cuda", "source '/x y/bin/activate'"]),
        "secrets": st.just(["HF_TOKEN"]), "secrets_file": st.just("/home/me/.secrets"),
        "env_vars": st.just({"PLAIN": "it's $HOME"}), "ray_options": st.just(["--object-store-memory=100000000"]),
    },
)  # fmt: skip


@settings(max_examples=15)
@given(SLURM)
def test_batch_scripts_are_bash_and_say_what_they_must(options: dict[str, Any]) -> None:
    target = SlurmTarget.model_validate({"type": "slurm", "shared_dir": "/s", "working_dir": "/w", **options})
    script = render_script(target, JOB)
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    header = script[: script.index("\n# nvembed-tiny")]
    assert "--signal=B:USR1@120" in header and "--requeue" in header and "--ntasks-per-node=1" in header
    assert ("--exclusive" in header) is options.get("exclusive", True)
    assert f'ray symmetric-run --address "$RAY_ADDRESS" --min-nodes {target.nodes} ' in script
    assert f"--cpus-per-task={target.cpus_per_node} --cpu-bind=none" in script
    assert ("--include-dashboard" in script) is (target.nodes == 1), "ray start refuses it on worker nodes"
    exported = next(line for line in header.splitlines() if "--export=" in line)
    assert ("HF_TOKEN" in exported) is ("secrets" in options) and "ALL" not in exported


def test_no_placeholder_is_left_in_a_batch_script() -> None:
    import re

    target = load_target(str(ROOT / "cluster/slurm.yaml"))
    assert isinstance(target, SlurmTarget)
    script = render_script(target, JOB)
    assert re.findall(r"@[A-Z_]+@", script) == []
    assert "--num-gpus=8" in script and "/shared/runs/it" in script


@pytest.mark.parametrize(("text", "size"), [("8Gi", 2**33), ("8G", 8 * 10**9), ("8g", 2**33), ("512Mi", 2**29)])
def test_sizes_of_kubernetes_and_docker(text: str, size: int) -> None:
    assert quantity_bytes(text) == size and object_store_bytes(text) == int(0.9 * size)


@pytest.mark.parametrize(("text", "size"), [("16Gi", 2**34), ("1.5G", 1.5e9), ("1500m", 1.5), ("2Pi", 2**51), ("7", 7)])
def test_quantities_of_kubernetes(text: str, size: float) -> None:
    assert memory_bytes(text) == pytest.approx(size)


# -- clouds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_ray_up_files_fit_rays_own_schema(name: str) -> None:
    import importlib.util

    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.submodule_search_locations
    schema = json.loads(Path(spec.submodule_search_locations[0], "autoscaler/ray-schema.json").read_text())
    target = load_target(str(ROOT / f"cluster/{name}.yaml"))
    assert isinstance(target, CloudTarget)
    cluster = render_cluster(target, "/home/me/.ray/auth_token")
    jsonschema.validate(cluster, schema)
    assert yaml.safe_load(as_yaml(cluster)) == cluster
    head, worker = cluster["available_node_types"]["head"], cluster["available_node_types"]["gpu"]
    assert ("spot" in json.dumps(worker).lower()) and ("spot" not in json.dumps(head).lower())
    assert worker["resources"]["GPU"] == 8 and "GPU" not in head["resources"]
    start = cluster["head_start_ray_commands"][1]
    assert "--dashboard-host=127.0.0.1" in start and "RAY_AUTH_MODE=token" in start
    assert f"--object-store-memory={object_store_bytes(target.shm)}" in start
    # as `ray up` fills keys that are not there: with pip installs that the image's user may not make
    assert not any(cluster[f"{kind}setup_commands"] for kind in ("", "head_", "worker_"))
    assert cluster["file_mounts"] == {"/home/ray/.ray/auth_token": "/home/me/.ray/auth_token"}
    for starts in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert " python -m nvembed.jobs.cloud.node_secrets HF_TOKEN=" in starts[1] and " -- ray start " in starts[1]
    assert any("rclone mount" in line and target.bucket.partition("://")[2] in line
               for line in cluster["initialization_commands"])  # fmt: skip
