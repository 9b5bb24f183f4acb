"""`type: cloud`: a cluster of virtual machines made by `ray up`, and the job on it through a tunnel.

The head is an ordinary machine (its loss ends the run), workers with accelerators are spot machines. The dashboard's
port is closed to other machines: `ray dashboard` tunnels it through SSH. The bucket is mounted on every machine with
rclone, since model folders need files. Rendered and checked against Ray's schema; never run against a cloud by us.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvembed.core.model_cache import NEVER
from nvembed.core.ray_cluster import make_token
from nvembed.jobs.backend import JobState, Preview, Say, as_yaml
from nvembed.jobs.cloud.node_secrets import command_with_secrets
from nvembed.jobs.command import Job
from nvembed.jobs.config import CloudTarget, Machine, RayTarget
from nvembed.jobs.ray.backend import RayBackend, SilentError, read_token
from nvembed.jobs.target import object_store_bytes
from nvembed.preflight.findings import PreflightError
from nvembed.types import UserError

HEAD = "head"
TOKEN_ON_NODES = "/home/{user}/.ray/auth_token"
TUNNEL_SECONDS = 60.0
HINT = "pip install 'ray[default]' boto3 (AWS) or google-api-python-client (GCP), and log in to the cloud first."


def render_cluster(target: CloudTarget, token_file: str) -> dict[str, Any]:
    """The configuration of `ray up`. Pure; the token is a file that `ray up` copies to the nodes.

    Args:
        token_file: path on this machine of the file that holds the cluster's token.
    """
    shm = f"--shm-size={target.shm}"
    mount = f"-v {target.mount_path}:{target.mount_path}:rshared"
    types = {HEAD: _node(target, target.head, spot=False)}
    for group in target.workers:
        types[group.name] = _node(target, group, spot=group.spot) | {
            "min_workers": group.min_workers,
            "max_workers": group.max_workers,
        }
    prepare = "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0; ulimit -n 65536; "
    start = f"ray start --object-store-memory={object_store_bytes(target.shm)}"
    start = prepare + command_with_secrets(target, start)
    models = {place: str(Path(folder).expanduser().absolute()) for place, folder in target.models.items()}
    return {
        "cluster_name": target.cluster_name,
        "max_workers": sum(group.max_workers for group in target.workers),
        "idle_timeout_minutes": target.idle_minutes,
        "provider": _provider(target),
        "auth": {"ssh_user": target.ssh_user},
        "docker": {
            "image": target.image,
            "container_name": "nvembed",
            "pull_before_run": True,
            "run_options": [shm, mount, "--ulimit nofile=65536:65536"],
        },
        "available_node_types": types,
        "head_node_type": HEAD,
        "file_mounts": {TOKEN_ON_NODES.format(user=target.container_user): token_file, **models},
        "initialization_commands": _mount_bucket(target),
        # Ray's own defaults would install packages into the image's environment, which is root's.
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --num-cpus=0 --num-gpus=0 --autoscaling-config=~/ray_bootstrap_config.yaml "
            "--dashboard-host=127.0.0.1",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
    }


def _provider(target: CloudTarget) -> dict[str, Any]:
    provider = target.provider
    if provider.type == "aws":
        zones = {"availability_zone": provider.zones} if provider.zones else {}
        return {"type": "aws", "region": provider.region, "cache_stopped_nodes": False, **zones}
    return {
        "type": "gcp",
        "region": provider.region,
        "availability_zone": provider.zone,
        "project_id": provider.project,
        "cache_stopped_nodes": False,
    }


def _node(target: CloudTarget, machine: Machine, *, spot: bool) -> dict[str, Any]:
    provider = target.provider
    resources = {"CPU": machine.cpus} | ({"GPU": machine.gpus} if machine.gpus else {})
    config: dict[str, Any]
    if provider.type == "aws":
        disk = {"VolumeSize": machine.disk_gb, "VolumeType": "gp3", "Encrypted": True}
        config = {
            "InstanceType": machine.machine,
            "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
        }
        if provider.image_id:
            config["ImageId"] = provider.image_id
        if provider.instance_profile:
            config["IamInstanceProfile"] = {"Arn": provider.instance_profile}
        if spot:
            config["InstanceMarketOptions"] = {"MarketType": "spot"}
        return {"resources": resources, "node_config": config}
    boot = {"diskSizeGb": machine.disk_gb, "sourceImage": provider.source_image}
    scheduling: dict[str, Any] = {"onHostMaintenance": "TERMINATE"} if machine.gpus else {}
    if spot:
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE", "automaticRestart": False}
    config = {
        "machineType": machine.machine,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": boot}],
        "scheduling": scheduling,
    }
    if machine.accelerator:
        kind = f"projects/{provider.project}/zones/{provider.zone}/acceleratorTypes/{machine.accelerator}"
        config["guestAccelerators"] = [{"acceleratorType": kind, "acceleratorCount": machine.gpus}]
    if provider.service_account:
        scopes = ["https://www.googleapis.com/auth/cloud-platform"]
        config["serviceAccounts"] = [{"email": provider.service_account, "scopes": scopes}]
    return {"resources": resources, "node_config": config}


def _mount_bucket(target: CloudTarget) -> list[str]:
    """Outside the container, on every machine; the machine's own role opens the bucket, no key is written down."""
    scheme, _, path = target.bucket.partition("://")
    remote = {"s3": ":s3,provider=AWS,env_auth=true:", "gs": ":gcs,env_auth=true,bucket_policy_only=true:"}[scheme]
    options = "--vfs-cache-mode full --vfs-write-back 0s --dir-cache-time 5s --allow-other --umask 000 --daemon"
    return [
        "which rclone >/dev/null || (sudo apt-get update -q && sudo apt-get install -qy rclone fuse3)",
        f"sudo mkdir -p {target.mount_path}",
        f"mountpoint -q {target.mount_path} || sudo rclone mount '{remote}{path}' {target.mount_path} {options}",
    ]


class CloudBackend:
    """A cluster of `ray up`; its jobs are those of its head, through a tunnel."""

    def __init__(self, target: CloudTarget) -> None:
        self._target = target
        address = f"http://127.0.0.1:{target.local_port}"
        self._ray = RayBackend(
            RayTarget(
                address=address,
                env_vars=target.env_vars,
                secrets=tuple(target.secrets),  # the job checks that its machine has them
                working_dir=target.working_dir,
                shared_paths=(target.mount_path,),
            )
        )

    def preview(self, job: Job) -> Preview:
        """The file for `ray up`, the steps, the job."""
        check_models(self._target)
        cluster = render_cluster(self._target, str(token_file()))
        ray = self._ray.preview(job)
        steps = [
            "ray up --yes --no-config-cache CLUSTER.yaml   # not while jobs run there: it starts Ray anew",
            f"ray dashboard CLUSTER.yaml --port {self._target.local_port}   # the tunnel",
            f"the job below, sent to http://127.0.0.1:{self._target.local_port}",
            "ray down CLUSTER.yaml   # yours to give: idle workers go by themselves, the head stays",
        ]
        comment = "".join(f"# {number}. {step}\n" for number, step in enumerate(steps, 1))
        text = f"{comment}# CLUSTER.yaml\n{as_yaml(cluster)}---\n{ray.text}"
        return Preview({"type": "cloud", "steps": steps, "cluster": cluster, "job": ray.value}, text)

    def submit(self, job: Job, say: Say) -> str:
        """`ray up` (unless jobs run there: it starts Ray anew, which would end them), the tunnel, the job."""
        self.preview(job)  # raises its problems before machines are paid for
        prepare_token()
        name = self._target.cluster_name
        if alive := self._alive(say):
            say(f"{name}: no `ray up` while {', '.join(alive)} runs there; changes of the target wait for the next one")
        else:
            with self._config_file() as file:
                say(f"ray up: {name}")
                _run_ray("up", "--yes", "--no-config-cache", str(file))
        with self._tunnel():
            return self._ray.submit(job, say)

    def _alive(self, say: Say) -> list[str]:
        """Ids of all jobs on the cluster; none where there is no cluster or no Ray on its head."""
        with self._config_file() as file:
            if _ray_exit_code("get-head-ip", str(file)):
                return []
        with self._tunnel():
            try:
                return self._ray.alive()
            except SilentError:
                say(f"{self._target.cluster_name}: its head is up, but Ray does not answer there")
                return []

    def follow(self, job_id: str, write: Say, say: Say) -> int:
        """As on any Ray cluster."""
        with self._tunnel():
            return self._ray.follow(job_id, write, say)

    def states(self) -> list[JobState]:
        """As on any Ray cluster."""
        with self._tunnel():
            return self._ray.states()

    def logs(self, job_id: str) -> str:
        """As on any Ray cluster."""
        with self._tunnel():
            return self._ray.logs(job_id)

    def stop(self, job_id: str) -> None:
        """Ends the job, not the machines: `ray down` does that."""
        with self._tunnel():
            self._ray.stop(job_id)

    @contextlib.contextmanager
    def _config_file(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="nvembed-cloud-") as folder:
            file = Path(folder, f"{self._target.cluster_name}.yaml")
            file.write_text(as_yaml(render_cluster(self._target, str(token_file()))))
            yield file

    @contextlib.contextmanager
    def _tunnel(self) -> Iterator[None]:
        """`ray dashboard` for as long as it is needed."""
        if _reachable(self._target.local_port):  # the user's own tunnel
            yield
            return
        with self._config_file() as file:
            command = ["ray", "dashboard", str(file), "--port", str(self._target.local_port), "--no-config-cache"]
            try:
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            except FileNotFoundError as error:
                raise PreflightError(f"ray is not installed here. {HINT}") from error
            try:
                deadline = time.monotonic() + TUNNEL_SECONDS
                while not _reachable(self._target.local_port):
                    if process.poll() is not None or time.monotonic() > deadline:
                        process.terminate()
                        raise PreflightError(f"no tunnel to the head: {process.communicate()[1][-1000:]}")
                    time.sleep(0.5)
                yield
            finally:
                process.terminate()
                process.wait(timeout=10)


def check_models(target: CloudTarget) -> None:
    """Check that the folders to copy to the machines are model folders.

    Raises:
        UserError: no such folder, no model in it, or weights that are pickled: these are never loaded, so never sent.
    """
    for place, given in target.models.items():
        folder = Path(given).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(f"models: {place}: {folder} is not a model folder (it has no config.json)")
        pickled = sorted(path.name for path in folder.rglob("*") if path.name.endswith(NEVER))
        if pickled:
            raise UserError(f"models: {place}: {folder} holds {pickled[0]}; only safetensors are loaded. Take it out")


def token_file() -> Path:
    """The file with the cluster's token: RAY_AUTH_TOKEN_PATH, else Ray's own ~/.ray/auth_token."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else Path.home() / ".ray" / "auth_token"


def prepare_token() -> None:
    """Create the token's file if it is missing, readable by its owner only; see `make_token`.

    Raises:
        PreflightError: RAY_AUTH_TOKEN is set to another token than the file's.
    """
    path = make_token(token_file())
    if read_token() != path.read_text().strip():
        raise PreflightError(
            f"RAY_AUTH_TOKEN is not the token in {path}, which the nodes are given. Unset one of them."
        )


def _reachable(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2):
            return True
    except OSError:
        return False


def _run_ray(*arguments: str) -> None:
    if code := _ray_exit_code(*arguments, shown=True):
        raise PreflightError(f"ray {arguments[0]} failed with {code}; see above. {HINT}")


def _ray_exit_code(*arguments: str, shown: bool = False) -> int:
    """Exit code of a `ray` command."""
    output = None if shown else subprocess.DEVNULL
    try:
        return subprocess.run(["ray", *arguments], stdout=output, stderr=output, check=False).returncode
    except FileNotFoundError as error:
        raise PreflightError(f"ray is not installed here. {HINT}") from error
