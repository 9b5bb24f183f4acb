"""Targets: the files in `cluster/` that say where jobs run and with what. Data only; no secret ever stands in them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nvembed.types import Config

Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
DnsLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?([munkKMGTPE]|[KMGTPE]i)?$")]  # of Kubernetes
AbsolutePath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9_./@%+=:,-]*$")]  # no shell would read more into it
Line = Annotated[str, Field(pattern=r"^[^\n\r\x00]+$")]
RayOption = Annotated[str, Field(pattern=r"^--[a-z0-9-]+(=[A-Za-z0-9_.:/@,+=-]*)?$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/@,+=-]*$")]


class TargetConfig(Config):
    """What every target says."""

    outputs: str | None = Field(None, min_length=1, description="Where outputs go when the command has no --out.")
    env_vars: dict[Variable, str] = Field({}, description="Plain settings of the job; never secrets.")


# -- ray --------------------------------------------------------------------------------------------------------------


class Entrypoint(Config):
    """What the driver reserves; nothing by default, so that it runs on the head node."""

    num_cpus: float = Field(0, ge=0)
    num_gpus: float = Field(0, ge=0)
    memory_mb: int = Field(0, ge=0)
    resources: dict[str, float] = Field({})
    label_selector: dict[str, str] = Field({})


class RayTarget(TargetConfig):
    """A Ray cluster that runs, reached through its Jobs API."""

    type: Literal["ray"] = "ray"
    address: str = Field(
        pattern=r"^https?://[^/\s@]+(/[^\s@]*)?$", description="http(s)://HOST:PORT of the dashboard, no credentials."
    )
    authentication: Literal["token", "disabled"] = "token"
    plain_http: bool = Field(False, description="Send the token unencrypted to a host that is not this machine.")
    verify: bool | str = Field(True, description="Check the TLS certificate; or a file or directory of authorities.")
    headers: dict[str, Variable] = Field({}, description="HTTP header -> environment variable that holds its value.")
    secrets: tuple[Variable, ...] = Field(
        (), description="Variables that the cluster's nodes have; checked by the job."
    )
    working_dir: str = Field(".", description="The code that travels; relative to where the command is given.")
    excludes: tuple[str, ...] = Field((), description="Further patterns that do not travel, as in a .gitignore.")
    max_megabytes: float = Field(64, gt=0, le=500, description="Largest working_dir; Ray itself refuses 500.")
    shared_paths: tuple[AbsolutePath, ...] = Field((), description="Directories that every node mounts.")
    entrypoint: Entrypoint = Entrypoint()
    stop_wait_seconds: int = Field(30, ge=1, description="Between being asked to stop and being killed.")
    reconnect_seconds: int = Field(600, ge=1, description="How long a lost connection is tried again.")


# -- kuberay ----------------------------------------------------------------------------------------------------------


class Toleration(Config):
    """Of Kubernetes."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Pod(Config):
    """Size and place of a pod."""

    cpu: Quantity = "4"
    memory: Quantity = "16Gi"
    shm: str = Field(
        "4Gi",
        pattern=r"^[0-9]+([KMGT]i|[kMGT])$",
        description="Size of /dev/shm, counted as memory: Ray's object store lies there.",
    )
    node_selector: dict[str, str] = Field({})
    tolerations: tuple[Toleration, ...] = ()


class WorkerGroup(Pod):
    """Equal pods with accelerators."""

    name: DnsLabel = "gpu"
    gpus: int = Field(1, ge=0)
    gpu_resource: Word = "nvidia.com/gpu"
    min_workers: int = Field(0, ge=0)
    max_workers: int = Field(1, ge=1)


class SharedVolume(Config):
    """A volume claim that many nodes may write (ReadWriteMany)."""

    type: Literal["claim"]
    claim: DnsLabel
    mount_path: AbsolutePath


class ObjectStorage(Config):
    """A bucket; model folders need a file system today, so this serves data and artifacts only."""

    type: Literal["bucket"]
    uri: str = Field(pattern=r"^[a-z0-9]+://[^\s@]+$")


class SecretKey(Config):
    """A value inside a Kubernetes Secret."""

    secret: str = Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]+$")


class Kueue(Config):
    """Gang admission by Kueue: the job starts suspended and Kueue lets it go whole."""

    type: Literal["kueue"]
    queue: DnsLabel
    priority_class: DnsLabel | None = None


class Volcano(Config):
    """Gang scheduling by Volcano (the operator must run with batchScheduler volcano)."""

    type: Literal["volcano"]
    queue: DnsLabel | None = None
    priority_class: DnsLabel | None = None


class KubeRayTarget(TargetConfig):
    """A RayJob on Kubernetes: a Ray cluster of its own for every job."""

    type: Literal["kuberay"]
    namespace: DnsLabel = "default"
    context: str | None = Field(None, description="kubectl context; the current one by default.")
    image: Word
    image_pull_secrets: tuple[DnsLabel, ...] = ()
    service_account: DnsLabel | None = None
    run_as_user: int = Field(1000, ge=1, description="User of the containers; never root.")
    ray_version: str = Field("2.60.0", pattern=r"^\d+\.\d+\.\d+$")
    code_dir: AbsolutePath = Field("/app", description="Where the image has pipelines/.")
    head: Pod = Pod()
    workers: tuple[WorkerGroup, ...] = Field((WorkerGroup(),), min_length=1, max_length=7)
    spot_labels: dict[str, str] = Field(
        {
            "cloud.google.com/gke-spot": "true",
            "eks.amazonaws.com/capacityType": "SPOT",
            "karpenter.sh/capacity-type": "spot",
            "kubernetes.azure.com/scalesetpriority": "spot",
        },
        description="Labels of nodes that may be taken away; the head never goes there.",
    )
    autoscaling: bool = True
    idle_seconds: int = Field(120, ge=10)
    storage: Annotated[SharedVolume | ObjectStorage, Field(discriminator="type")]
    secrets: dict[Variable, SecretKey] = Field({}, description="Environment variable -> key of a Secret.")
    secrets_from: tuple[DnsLabel, ...] = Field((), description="Secrets whose every key becomes a variable.")
    gang: Annotated[Kueue | Volcano, Field(discriminator="type")] | None = None
    retries: int = Field(3, ge=0, description="New clusters after a failure; each goes on where the last one stopped.")
    deadline_hours: float = Field(24, gt=0)
    ttl_seconds: int = Field(600, ge=60, description="How long a finished cluster is kept; 0 once failed good jobs.")


# -- slurm ------------------------------------------------------------------------------------------------------------


class SlurmTarget(TargetConfig):
    """A Slurm cluster: one batch job, one Ray cluster inside it."""

    type: Literal["slurm"]
    nodes: int = Field(1, ge=1)
    cpus_per_node: int = Field(8, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    memory: str | None = Field(None, pattern=r"^\d+[KMGT]?$", description="Per node, as sbatch takes it.")
    time_limit: str = Field("24:00:00", pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclusive: bool = Field(
        True, description="Whole nodes: `ray symmetric-run` ends every Ray of the user on its node."
    )
    shared_dir: AbsolutePath = Field(description="Directory that every node mounts: logs, the token of the job.")
    working_dir: AbsolutePath = Field(description="Checkout on storage that every node mounts; has pipelines/.")
    temp_dir: AbsolutePath = Field("/tmp", max_length=40, description="Node-local; holds sockets, hence short.")
    setup: tuple[Line, ...] = Field((), description="Shell lines before the run: modules, the virtual environment.")
    secrets: tuple[Variable, ...] = Field((), description="Variables taken from where the command is given.")
    secrets_file: AbsolutePath | None = Field(
        None, description="Shell file on the cluster, mode 0600, read by the job."
    )
    interface: Word | None = Field(None, description="Network interface between nodes; the first address by default.")
    port: int | None = Field(None, ge=1024, le=65535, description="Of Ray's head; null: a free one.")
    ray_options: tuple[RayOption, ...] = Field(
        (), description="Further options of `ray start` on every node: --name=value."
    )
    cluster_wait_seconds: int = Field(600, ge=30, description="How long nodes may take to join.")
    signal_seconds: int = Field(120, ge=10, description="How long before the time limit the run is told to stop.")
    max_requeues: int = Field(20, ge=0)


# -- cloud ------------------------------------------------------------------------------------------------------------


class Aws(Config):
    """Amazon: EC2."""

    type: Literal["aws"]
    region: Word
    zones: str | None = Field(None, description="Availability zones, comma-separated.")
    image_id: Word | None = Field(None, description="AMI with Docker and the GPU driver; Ray's default otherwise.")
    instance_profile: Word | None = Field(None, description="ARN of the profile that may read and write the bucket.")


class Gcp(Config):
    """Google: Compute Engine."""

    type: Literal["gcp"]
    project: Word
    region: Word
    zone: Word
    source_image: Word = "projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204"
    service_account: str | None = Field(None, description="E-mail of the account that may read and write the bucket.")


class CloudSecret(Config):
    """Where each machine finds a value when Ray starts there, with its own role: never the value."""

    secret: str | None = Field(
        None, pattern=r"^[A-Za-z0-9/_+=.@:-]{1,512}$", description="Name (AWS: or ARN) in the cloud's secret manager."
    )
    parameter: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_./:-]{1,1024}$", description="AWS: name in Systems Manager's Parameter Store."
    )
    key: str | None = Field(None, pattern=r"^[-._a-zA-Z0-9]+$", description="Field of a secret that holds JSON.")
    version: str = Field("latest", pattern=r"^(latest|[1-9][0-9]*)$", description="GCP: of the secret.")


class Machine(Config):
    """A kind of node."""

    machine: Word = Field(description="Instance or machine type.")
    cpus: int = Field(ge=1)
    gpus: int = Field(0, ge=0)
    accelerator: Word | None = Field(None, description="GCP: the GPU's type, where the machine type does not imply it.")
    disk_gb: int = Field(200, ge=30)


class CloudWorkers(Machine):
    """Nodes that come and go."""

    name: DnsLabel = "gpu"
    spot: bool = True
    min_workers: int = Field(0, ge=0)
    max_workers: int = Field(1, ge=1)


class CloudTarget(TargetConfig):
    """A Ray cluster of virtual machines, made by `ray up`."""

    type: Literal["cloud"]
    cluster_name: DnsLabel
    provider: Annotated[Aws | Gcp, Field(discriminator="type")]
    image: Word
    head: Machine
    workers: tuple[CloudWorkers, ...] = Field(min_length=1)
    idle_minutes: float = Field(10, gt=0)
    ssh_user: Word = "ubuntu"
    shm: str = Field("8g", pattern=r"^[0-9]+[kKmMgG]$", description="Size of /dev/shm, as docker takes it.")
    bucket: str = Field(pattern=r"^(s3|gs)://[a-z0-9][^\s@]*$", description="Object storage of the runs.")
    mount_path: AbsolutePath = Field("/mnt/nvembed", description="Where every node sees the bucket as files.")
    secrets: dict[Variable, CloudSecret] = Field({}, description="Environment variable -> where machines find it.")
    models: dict[AbsolutePath, str] = Field(
        {}, description="Folder on every machine -> model folder here, copied there once by `ray up`."
    )
    container_user: Word = "ray"
    working_dir: str = "."
    local_port: int = Field(8265, ge=1024, le=65535, description="Of the tunnel to the head's dashboard.")
