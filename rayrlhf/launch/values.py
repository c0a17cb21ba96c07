"""The values that `rayrlhf manifests` renders all of a cluster's files from: what its nodes are, what is run there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from rayrlhf.config.base import Folder, NonNegativeInt, Positive, PositiveInt, Section

__all__ = ["Head", "Images", "Kubernetes", "Launcher", "Monitoring", "Slurm", "Storage", "Values", "WorkerGroup"]

# A DNS label (RFC 1123) that leaves room for what Kubernetes and KubeRay put behind it.
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)]
# It ends up in a line of its own, and as a word of that line.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$")]
AbsolutePath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]+$")]


class Node(Section):
    cpus: PositiveInt = 7
    """What Ray is told of, and on Kubernetes what its pod asks for: less than the machine has. A node's own services
    keep some, and a pod that asks for all waits forever."""
    memory_gib: PositiveInt = 28
    """Likewise."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """KubeRay: labels of the Kubernetes nodes that it may run on."""
    node_config: dict[str, Any] = Field(default_factory=dict)
    """Cluster launcher: what the cloud is asked for, in its own words, `{InstanceType: p5.48xlarge}`."""


class Head(Node):
    """The node of Ray's head and the run's driver; no rank is placed on it, but by Slurm, whose first node it is."""

    memory_gib: PositiveInt = 16


class WorkerGroup(Node):
    """Nodes that are alike."""

    gpus: NonNegativeInt = 0
    """Of one node."""
    nodes: NonNegativeInt | None = None
    """There from the first moment to the last; left out: as many as `config` needs at once. A run refuses to start on
    a cluster that has less."""
    most: PositiveInt | None = None
    """With `autoscaling` so many at most; left out: `nodes`."""
    shared_memory_gib: PositiveInt | None = None
    """KubeRay: of /dev/shm, where Ray's objects and weights between processes are. Left out: a third of the memory."""
    resources: dict[str, PositiveInt] = Field(default_factory=dict)
    """Ray's custom resources of a node, which `cluster.<role>.resources` of a config asks for."""

    @model_validator(mode="after")
    def _most_is_no_less(self) -> WorkerGroup:
        if self.most is not None and self.nodes is not None and self.most < self.nodes:
            raise ValueError(f"most {self.most} is less than nodes {self.nodes}")
        return self


class Images(Section):
    """Of the project, as the Dockerfiles build it."""

    gpu: Word = "rayrlhf:gpu"
    cpu: Word = "rayrlhf:cpu"
    base_gpu: Word | None = None
    """What the GPU image starts from; left out: Ray's own of the tested version, which has the CUDA compiler for
    DeepSpeed's operators."""
    base_cpu: Word = "python:3.11-bookworm"
    packages: tuple[str, ...] = ()
    """Python packages that the CPU image has besides: for the cluster launcher the cloud's own, `boto3==1.40.0`."""
    pull_secrets: tuple[Name, ...] = ()
    """Secrets of Kubernetes with which a private registry is read."""


class Storage(Section):
    """What every node sees under the same path: configs, data, runs."""

    path: AbsolutePath = "/shared"
    claim: Name = "rayrlhf-shared"
    """KubeRay: the PersistentVolumeClaim mounted there, in every pod."""
    size: Annotated[str, Field(pattern=r"^[0-9]+(Gi|Ti)$")] = "1Ti"
    storage_class: str | None = None
    """One that can be written from many nodes (NFS, Lustre, CephFS); left out: the cluster's default one."""


class Kubernetes(Section):
    namespace: Name = "default"
    auth_secret: Name = "rayrlhf-auth"
    """The Secret whose key `auth_token` is Ray's token."""
    env_secrets: tuple[Name, ...] = ("rayrlhf-env",)
    """Secrets whose keys become environment variables: HF_TOKEN, WANDB_API_KEY. They may be missing."""
    retries: NonNegativeInt = 2
    """How often a RayJob that failed is begun anew, on a new cluster: it goes on from its newest checkpoint."""
    keep_s: NonNegativeInt = 600
    """How long the cluster of a finished RayJob stays, for a look at it."""


class Launcher(Section):
    provider: dict[str, Any] = Field(default_factory=lambda: {"type": "aws", "region": "us-west-2"})
    """As Ray's cluster launcher wants it: a cloud, or `{type: local, head_ip: ..., worker_ips: [...]}`."""
    ssh_user: Word = "ubuntu"
    ssh_private_key: str | None = None
    """A path; left out: the launcher makes a key, where the cloud lets it."""
    docker: bool = True
    """Run in `images`; else the project is on the nodes, by `setup_commands`."""
    initialization_commands: tuple[str, ...] = ()
    """On the nodes themselves, before anything: mount `storage.path` here."""
    setup_commands: tuple[str, ...] = ()
    """Where Ray runs, before it starts."""
    idle_minutes: Positive = 10.0

    @model_validator(mode="after")
    def _a_local_cluster_has_addresses(self) -> Launcher:
        if "type" not in self.provider:
            raise ValueError("provider.type: missing; aws, gcp, azure or local, for example")
        if self.provider["type"] == "local" and not (
            "head_ip" in self.provider and isinstance(self.provider.get("worker_ips"), list)
        ):
            raise ValueError("provider.type is local: give provider.head_ip and a list, provider.worker_ips")
        return self


class Slurm(Section):
    group: str | None = None
    """The group of `workers` that the job's nodes are; left out: the one that has nodes."""
    partition: Annotated[str, Field(pattern=r"^[A-Za-z0-9._,-]+$")] | None = None
    account: Word | None = None
    time: Annotated[str, Field(pattern=r"^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$")] = "24:00:00"
    grace_s: PositiveInt = 300
    """So long before the end of `time` the run is asked to end, which saves a checkpoint."""
    options: tuple[Annotated[str, Field(pattern=r"^--[a-z-]+(=.*)?$")], ...] = ()
    """More of sbatch's, `--qos=high`."""
    setup: tuple[str, ...] = ()
    """Shell lines that make `ray` and `rayrlhf` known on every node: modules, an environment on shared storage."""


class Monitoring(Section):
    interval_s: PositiveInt = 15
    """Between two looks of Prometheus."""
    port: Annotated[int, Field(ge=1024, le=65535, strict=True)] = 8080
    """Where each node's agent offers its metrics."""


class Values(Section):
    name: Name = "rayrlhf"
    """Of the cluster and of the job."""
    config: Folder | None = None
    """The run's config, a file here (relative: beside the values). The worker groups get their size from it."""
    command: tuple[str, ...] | None = None
    """What is run on the head; left out: `rayrlhf run` of the config, with --resume."""
    autoscaling: bool = True
    """KubeRay and cluster launcher: nodes beyond `workers.<group>.nodes` come when actors wait, and go when idle."""
    head: Head = Head()
    workers: dict[Name, WorkerGroup] = Field(
        default_factory=lambda: {"gpu": WorkerGroup(gpus=8, cpus=90, memory_gib=768)}
    )
    images: Images = Images()
    storage: Storage = Storage()
    kubernetes: Kubernetes = Kubernetes()
    launcher: Launcher = Launcher()
    slurm: Slurm = Slurm()
    monitoring: Monitoring = Monitoring()

    @model_validator(mode="after")
    def _something_is_run(self) -> Values:
        if self.config is None and self.command is None:
            raise ValueError("config and command are both left out: name a config, or what is to be run")
        if self.config is None and any(group.nodes is None for group in self.workers.values()):
            names = ", ".join(name for name, group in self.workers.items() if group.nodes is None)
            raise ValueError(f"workers.<group>.nodes is left out ({names}) and so is config: nothing says how many")
        if "head" in self.workers:
            raise ValueError("workers.head: the launcher calls the node of the head so; take another name")
        if self.slurm.group is not None and self.slurm.group not in self.workers:
            raise ValueError(f"slurm.group: workers has no {self.slurm.group}; one of {', '.join(self.workers)}")
        return self

    def beside(self, file: Path) -> Values:
        """A relative `config` starts from the folder of the values' file."""
        return self if self.config is None else self.model_copy(update={"config": file.parent / self.config})
