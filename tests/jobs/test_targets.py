"""Targets: all problems of a file at once, by line; the files of cluster/ are valid."""

from pathlib import Path

import pytest

from nvembed.jobs.config import RayTarget
from nvembed.jobs.target import KINDS, load_target
from nvembed.recipe.schema import RecipeError
from nvembed.types import UserError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "cluster").glob("*.yaml"))
RAY = "type: ray\naddress: http://127.0.0.1:8265\n"
KUBERAY = "type: kuberay\nimage: x/y:1\nstorage: {type: claim, claim: c, mount_path: /shared}\n"
SLURM = "type: slurm\nshared_dir: /s\nworking_dir: /w\n"
CLOUD = (
    "type: cloud\ncluster_name: c\nprovider: {type: aws, region: r}\nimage: i\nbucket: s3://b\n"
    "head: {machine: m, cpus: 2}\nworkers: [{machine: m, cpus: 2}]\n"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_files_of_cluster_are_valid(path: Path) -> None:
    assert load_target(str(path)).outputs


def test_every_kind_has_a_file() -> None:
    assert {path.stem for path in FILES} == {"local", "ray", "kuberay", "slurm", "aws", "gcp"}
    assert {load_target(str(path)).type for path in FILES} == set(KINDS)


WRONG = [
    (RAY.replace("ray", "rya", 1), ["1:7: type: 'rya': allowed: ray, kuberay, slurm, cloud. Did you mean 'ray'?"]),
    ("address: http://x\n", ["type: missing; allowed: ray, kuberay, slurm, cloud."]),
    ("", ["the target is empty"]),
    ("- a\n", ["a target is a mapping of sections"]),
    (
        RAY + "adress: x\nmax_megabytes: 900\nentrypoint: {num_gpu: 1}\n",
        ["3 problems", "3:1: adress: unknown key. Did you mean 'address'?", "4:16: max_megabytes: 900", "'num_gpus'?"],
    ),
    (RAY.replace("127.0.0.1", "h"), ["the token would travel unencrypted", "plain_http: true"]),
    (RAY.replace("http://127", "http://u:p@127"), ["address"]),
    (RAY.replace("127.0.0.1", "h") + "authentication: disabled\n", ["only a loopback address needs no token"]),
    (RAY.replace("http://127.0.0.1", "https://h") + "outputs: /a\n", ["outputs", "shared_paths is empty"]),
    (RAY + "env_vars: {HF_TOKEN: abc, MY_KEY: '1', PLAIN: x}\n",
     ["2 problems", "HF_TOKEN: looks like a secret by its name; name it under `secrets`", "MY_KEY"]),
    (RAY + "env_vars: {WHERE: 'postgresql://u:pw@h/d'}\n", ["WHERE: holds a URL with a password"]),
    (KUBERAY + "gang: {type: kueue, queue: q}\n", ["autoscaling", "a gang is admitted whole"]),
    (KUBERAY + "workers: [{min_workers: 3, max_workers: 2}, {}]\n", ["min_workers 3 is more than", "used twice"]),
    (RAY + "env_vars: {NOTE: hf_abcdefghijklmnop1234}\n", ["NOTE: holds what has the shape of an access token"]),
    (SLURM + "setup: ['export X=hf_abcdefghijklmnop1234']\n", ["setup.0: holds what has the shape of an access token"]),
    (KUBERAY + "head: {shm: 8gigs}\n", ["head.shm", "8gigs"]),
    (KUBERAY + "head: {memory: 8Gi, shm: 8Gi}\n", ["head: shm 8Gi is counted as memory of the pod", "leaves 0.00"]),
    (KUBERAY + "workers: [{memory: 16G, shm: 14Gi}]\n", ["workers.0: shm 14Gi", "leaves 0.90 GiB"]),
    (KUBERAY + "outputs: /other/x\n", ["not below the storage, /shared"]),
    (KUBERAY + "outputs: /shared/../x\n", ["not below the storage, /shared"]),
    (KUBERAY + "ttl_seconds: 0\n", ["ttl_seconds: 0: must be greater than or equal to 60"]),
    (KUBERAY.replace("claim, claim", "clam, claim"), ["'clam': allowed: claim, bucket. Did you mean 'claim'?"]),
    (SLURM + "time_limit: tomorrow\n", ["time_limit"]),
    (SLURM + "ray_options: [--port=3]\n", ["ray_options.0", "is set by the job itself"]),
    (SLURM + "setup: [\"a\\nb\"]\n", ["setup"]),
    (SLURM + "partition: '$(rm x)'\n", ["partition"]),
    (SLURM.replace("/s", "'/s; rm x'"), ["shared_dir"]),
    (CLOUD.replace("s3://", "gs://"), ["on aws a bucket begins with s3://"]),
    (CLOUD + "outputs: s3://b/x\n", ["not below mount_path"]),
    (CLOUD + "secrets: {A: {key: x}, B: {secret: s, parameter: p}, C: {secret: s, version: '3'}}\n",
     ["3 problems", "A: give one source", "B: give one source", "C: `version` is of GCP's"]),
    (CLOUD.replace("aws, region: r", "gcp, project: p, region: r, zone: z").replace("s3://", "gs://")
     + "secrets: {A: {parameter: p}}\n", ["A: `parameter` is AWS's"]),
    (CLOUD + "secrets: {A: hunter2}\n", ["secrets.A"]),
    (CLOUD + "secrets: {A: {secret: s}}\nenv_vars: {A: x}\n", ["A: also in env_vars; keep one"]),
    (CLOUD + "models: {/mnt/nvembed/m: m}\n", ["not below the bucket's mount"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "messages"), WRONG, ids=range(len(WRONG)))
def test_problems_are_reported_with_their_position(tmp_path: Path, text: str, messages: list[str]) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(RecipeError) as raised:
        load_target(str(tmp_path / "t.yaml"))
    assert all(part in str(raised.value) for part in messages), raised.value


def test_a_variable_with_the_value_of_a_secret_is_refused_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary-51f0")
    (tmp_path / "t.yaml").write_text(RAY + "env_vars: {PLAIN: canary-51f0}\n")
    with pytest.raises(RecipeError, match="PLAIN: has the value of MY_API_KEY, a secret of your environment") as raised:
        load_target(str(tmp_path / "t.yaml"))
    assert "canary" not in str(raised.value)
    (tmp_path / "t.yaml").write_text(SLURM + "setup: ['export X=canary-51f0']\n")
    with pytest.raises(RecipeError, match=r"setup\.0: holds the value of MY_API_KEY") as raised:
        load_target(str(tmp_path / "t.yaml"))
    assert "canary" not in str(raised.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "kuberay.yaml").write_text(KUBERAY)
    with pytest.raises(UserError, match=r"no such target\. Did you mean .*kuberay\.yaml"):
        load_target(str(tmp_path / "kubray.yaml"))


def test_defaults_are_the_careful_ones() -> None:
    target = RayTarget(address="https://h")
    assert target.authentication == "token" and target.verify is True and not target.plain_http
    assert target.entrypoint.num_gpus == 0
