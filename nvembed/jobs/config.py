"""Targets: schemas of the files in `cluster/`, which describe where jobs run. Data only; they hold no secrets."""

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
    """The keys of every target."""

    outputs: str | None = Field(
        None, min_length=1, description="Directory or URI of the outputs where the command has no --out."
    )
    env_vars: dict[Variable, str] = Field({}, description="Environment variables of the job; never secrets.")


# -- ray --------------------------------------------------------------------------------------------------------------


class Entrypoint(Config):
    """Resources of the driver; none by default, so that it runs on the head node."""

    num_cpus: float = Field(0, ge=0, description="CPUs of the driver.")
    num_gpus: float = Field(0, ge=0, description="GPUs of the driver.")
    memory_mb: int = Field(0, ge=0, description="Memory of the driver in MiB.")
    resources: dict[str, float] = Field({}, description="Custom Ray resources of the driver.")
    label_selector: dict[str, str] = Field({}, description="Labels of the node that runs the driver.")


class RayTarget(TargetConfig):
    """A running Ray cluster, reached through its Jobs API."""

    type: Literal["ray"] = Field("ray", description="Kind of the target.")
    address: str = Field(
        pattern=r"^https?://[^/\s@]+(/[^\s@]*)?$", description="http(s)://HOST:PORT of the dashboard, no credentials."
    )
    authentication: Literal["token", "disabled"] = Field("token", description="Authentication of the cluster.")
    plain_http: bool = Field(False, description="Send the token unencrypted to a host that is not this machine.")
    verify: bool | str = Field(
        True, description="Check the TLS certificate; a path names a file or directory of authorities."
    )
    headers: dict[str, Variable] = Field({}, description="HTTP header -> environment variable that holds its value.")
    secrets: tuple[Variable, ...] = Field(
        (), description="Variables that the nodes of the cluster have; the job checks them."
    )
    working_dir: str = Field(".", description="Directory to upload, relative to the current one.")
    excludes: tuple[str, ...] = Field((), description="Further patterns of files not to upload, as in a .gitignore.")
    max_megabytes: float = Field(
        64, gt=0, le=500, description="Largest upload in MB; Ray itself refuses more than 500."
    )
    shared_paths: tuple[AbsolutePath, ...] = Field((), description="Directories that every node mounts.")
    entrypoint: Entrypoint = Field(Entrypoint(), description="Resources of the driver.")
    stop_wait_seconds: int = Field(30, ge=1, description="Seconds between SIGTERM and SIGKILL.")
    reconnect_seconds: int = Field(600, ge=1, description="Seconds for which a lost connection is retried.")


# -- kuberay ----------------------------------------------------------------------------------------------------------


class Toleration(Config):
    """A toleration of Kubernetes."""

    key: str = Field(description="Key of the taint.")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="How the taint is matched.")
    value: str | None = Field(None, description="Value of the taint, with Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect of the taint; null: every effect."
    )


class Pod(Config):
    """Size and placement of a pod."""

    cpu: Quantity = Field("4", description="CPUs of the pod.")
    memory: Quantity = Field("16Gi", description="Memory of the pod.")
    shm: str = Field(
        "4Gi",
        pattern=r"^[0-9]+([KMGT]i|[kMGT])$",
        description="Size of /dev/shm, which holds Ray's object store; counted as memory of the pod.",
    )
    node_selector: dict[str, str] = Field({}, description="Labels of the nodes that may run the pod.")
    tolerations: tuple[Toleration, ...] = Field((), description="Taints of nodes that the pod tolerates.")


class WorkerGroup(Pod):
    """A group of equal worker pods with accelerators."""

    name: DnsLabel = Field("gpu", description="Name of the group.")
    gpus: int = Field(1, ge=0, description="Accelerators of a pod.")
    gpu_resource: Word = Field("nvidia.com/gpu", description="Kubernetes' name of the accelerator.")
    min_workers: int = Field(0, ge=0, description="Fewest pods of the group.")
    max_workers: int = Field(1, ge=1, description="Most pods of the group.")


class SharedVolume(Config):
    """A volume claim that many nodes can write (ReadWriteMany)."""

    type: Literal["claim"] = Field(description="Kind of the storage.")
    claim: DnsLabel = Field(description="Name of the PersistentVolumeClaim.")
    mount_path: AbsolutePath = Field(description="Where every pod mounts it.")


class ObjectStorage(Config):
    """A bucket; model folders need a file system today, so this serves data and artifacts only."""

    type: Literal["bucket"] = Field(description="Kind of the storage.")
    uri: str = Field(pattern=r"^[a-z0-9]+://[^\s@]+$", description="URI of the bucket, without credentials.")


class SecretKey(Config):
    """A value inside a Kubernetes Secret."""

    secret: str = Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", description="Name of the Secret.")
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]+$", description="Key in the Secret.")


class Kueue(Config):
    """Gang admission by Kueue: the job starts suspended, and Kueue admits all its pods at once."""

    type: Literal["kueue"] = Field(description="Kind of the gang scheduler.")
    queue: DnsLabel = Field(description="Name of the LocalQueue.")
    priority_class: DnsLabel | None = Field(None, description="Priority class of the job.")


class Volcano(Config):
    """Gang scheduling by Volcano (the operator must run with batchScheduler volcano)."""

    type: Literal["volcano"] = Field(description="Kind of the gang scheduler.")
    queue: DnsLabel | None = Field(None, description="Name of the queue; null: the default one.")
    priority_class: DnsLabel | None = Field(None, description="Priority class of the job.")


class KubeRayTarget(TargetConfig):
    """A RayJob on Kubernetes: every job has its own Ray cluster."""

    type: Literal["kuberay"] = Field(description="Kind of the target.")
    namespace: DnsLabel = Field("default", description="Namespace of the job.")
    context: str | None = Field(None, description="Context of kubectl; null: the current one.")
    image: Word = Field(description="Image of all pods.")
    image_pull_secrets: tuple[DnsLabel, ...] = Field((), description="Secrets to pull the image.")
    service_account: DnsLabel | None = Field(None, description="Service account of head and workers.")
    run_as_user: int = Field(1000, ge=1, description="User id of the containers; never root.")
    ray_version: str = Field("2.60.0", pattern=r"^\d+\.\d+\.\d+$", description="Version of Ray in the image.")
    code_dir: AbsolutePath = Field("/app", description="Directory of the image that contains pipelines/.")
    head: Pod = Field(Pod(), description="The head's pod.")
    workers: tuple[WorkerGroup, ...] = Field(
        (WorkerGroup(),), min_length=1, max_length=7, description="Groups of worker pods."
    )
    spot_labels: dict[str, str] = Field(
        {
            "cloud.google.com/gke-spot": "true",
            "eks.amazonaws.com/capacityType": "SPOT",
            "karpenter.sh/capacity-type": "spot",
            "kubernetes.azure.com/scalesetpriority": "spot",
        },
        description="Labels of spot nodes; the head never runs on one.",
    )
    autoscaling: bool = Field(True, description="Add and remove workers as the run needs them.")
    idle_seconds: int = Field(120, ge=10, description="Seconds until an idle worker is removed.")
    storage: Annotated[SharedVolume | ObjectStorage, Field(discriminator="type")] = Field(
        description="Storage that every pod shares."
    )
    secrets: dict[Variable, SecretKey] = Field({}, description="Environment variable -> key of a Secret.")
    secrets_from: tuple[DnsLabel, ...] = Field(
        (), description="Secrets all of whose keys become environment variables."
    )
    gang: Annotated[Kueue | Volcano, Field(discriminator="type")] | None = Field(
        None, description="Gang scheduling: all pods start together."
    )
    retries: int = Field(3, ge=0, description="New clusters after a failure; each resumes where the last one stopped.")
    deadline_hours: float = Field(24, gt=0, description="Longest time of the job, retries included.")
    ttl_seconds: int = Field(
        600, ge=60, description="Seconds until a finished cluster is deleted; 0 made good jobs fail."
    )


# -- slurm ------------------------------------------------------------------------------------------------------------


class SlurmTarget(TargetConfig):
    """A Slurm cluster: one batch job with one Ray cluster inside it."""

    type: Literal["slurm"] = Field(description="Kind of the target.")
    nodes: int = Field(1, ge=1, description="Nodes of the job.")
    cpus_per_node: int = Field(8, ge=1, description="CPUs per node.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs per node.")
    memory: str | None = Field(None, pattern=r"^\d+[KMGT]?$", description="Memory per node, in the format of sbatch.")
    time_limit: str = Field(
        "24:00:00",
        pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$",
        description="Time limit of the job, [days-]hours:minutes:seconds.",
    )
    partition: Word | None = Field(None, description="Partition of Slurm.")
    account: Word | None = Field(None, description="Account of Slurm.")
    qos: Word | None = Field(None, description="Quality of service.")
    constraint: Word | None = Field(None, description="Required features of the nodes.")
    exclusive: bool = Field(
        True, description="Whole nodes: `ray symmetric-run` ends every Ray of the user on its node."
    )
    shared_dir: AbsolutePath = Field(description="Directory that every node mounts, for logs and the job's files.")
    working_dir: AbsolutePath = Field(description="Checkout that every node mounts; contains pipelines/.")
    temp_dir: AbsolutePath = Field(
        "/tmp", max_length=40, description="Node-local directory; short, as it holds sockets."
    )
    setup: tuple[Line, ...] = Field((), description="Shell lines before the run: modules, the virtual environment.")
    secrets: tuple[Variable, ...] = Field(
        (), description="Variables that the job takes from the environment of the submission."
    )
    secrets_file: AbsolutePath | None = Field(
        None, description="Shell file on the cluster, mode 0600, that the job sources."
    )
    interface: Word | None = Field(
        None, description="Network interface between the nodes; null: that of the first address."
    )
    port: int | None = Field(None, ge=1024, le=65535, description="Port of Ray's head; null: a free one.")
    ray_options: tuple[RayOption, ...] = Field(
        (), description="Further options of `ray start` on every node: --name=value."
    )
    cluster_wait_seconds: int = Field(600, ge=30, description="Seconds that nodes may take to join.")
    signal_seconds: int = Field(
        120, ge=10, description="Seconds before the time limit at which the run saves and ends."
    )
    max_requeues: int = Field(20, ge=0, description="Most requeues at the time limit.")


# -- cloud ------------------------------------------------------------------------------------------------------------


class Aws(Config):
    """Amazon EC2."""

    type: Literal["aws"] = Field(description="Kind of the provider.")
    region: Word = Field(description="Region of the machines.")
    zones: str | None = Field(None, description="Availability zones, comma-separated.")
    image_id: Word | None = Field(None, description="AMI with Docker and the GPU driver; null: Ray's default.")
    instance_profile: Word | None = Field(
        None, description="ARN of the instance profile that can read and write the bucket."
    )


class Gcp(Config):
    """Google Compute Engine."""

    type: Literal["gcp"] = Field(description="Kind of the provider.")
    project: Word = Field(description="Project of the machines.")
    region: Word = Field(description="Region of the machines.")
    zone: Word = Field(description="Zone of the machines.")
    source_image: Word = Field(
        "projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204",
        description="Boot image with Docker and the GPU driver.",
    )
    service_account: str | None = Field(
        None, description="E-mail of the service account that can read and write the bucket."
    )


class CloudSecret(Config):
    """Reference to a secret that each machine reads with its own role when Ray starts there; never the value."""

    secret: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9/_+=.@:-]{1,512}$",
        description="Name in the cloud's secret manager; on AWS a name or an ARN.",
    )
    parameter: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_./:-]{1,1024}$", description="AWS only: name in Systems Manager's Parameter Store."
    )
    key: str | None = Field(None, pattern=r"^[-._a-zA-Z0-9]+$", description="Field of a secret that holds JSON.")
    version: str = Field("latest", pattern=r"^(latest|[1-9][0-9]*)$", description="GCP only: version of the secret.")


class Machine(Config):
    """The kind of machine of a node."""

    machine: Word = Field(description="Instance or machine type.")
    cpus: int = Field(ge=1, description="CPUs of the machine.")
    gpus: int = Field(0, ge=0, description="GPUs of the machine.")
    accelerator: Word | None = Field(
        None, description="GCP only: type of the GPU, where the machine type does not imply it."
    )
    disk_gb: int = Field(200, ge=30, description="Size of the disk in GB.")


class CloudWorkers(Machine):
    """A group of worker nodes that the autoscaler adds and removes."""

    name: DnsLabel = Field("gpu", description="Name of the group.")
    spot: bool = Field(True, description="Use spot machines.")
    min_workers: int = Field(0, ge=0, description="Fewest machines of the group.")
    max_workers: int = Field(1, ge=1, description="Most machines of the group.")


class CloudTarget(TargetConfig):
    """A Ray cluster of virtual machines, made by `ray up`."""

    type: Literal["cloud"] = Field(description="Kind of the target.")
    cluster_name: DnsLabel = Field(description="Name of the cluster.")
    provider: Annotated[Aws | Gcp, Field(discriminator="type")] = Field(description="The cloud and its settings.")
    image: Word = Field(description="Image of the containers.")
    head: Machine = Field(description="The head's machine.")
    workers: tuple[CloudWorkers, ...] = Field(min_length=1, description="Groups of worker machines.")
    idle_minutes: float = Field(10, gt=0, description="Minutes until an idle worker is removed.")
    ssh_user: Word = Field("ubuntu", description="User of the machines for SSH.")
    shm: str = Field("8g", pattern=r"^[0-9]+[kKmMgG]$", description="Size of /dev/shm, in the format of docker.")
    bucket: str = Field(pattern=r"^(s3|gs)://[a-z0-9][^\s@]*$", description="Bucket of the runs, without credentials.")
    mount_path: AbsolutePath = Field("/mnt/nvembed", description="Where every machine mounts the bucket.")
    secrets: dict[Variable, CloudSecret] = Field({}, description="Environment variable -> reference to its secret.")
    models: dict[AbsolutePath, str] = Field(
        {}, description="Folder on every machine -> local model folder, which `ray up` copies there."
    )
    container_user: Word = Field("ray", description="User inside the containers.")
    working_dir: str = Field(".", description="Directory to upload, relative to the current one.")
    local_port: int = Field(8265, ge=1024, le=65535, description="Local port of the tunnel to the head's dashboard.")
