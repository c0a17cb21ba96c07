"""Joining or starting Ray, quietly, and leaving it."""

from __future__ import annotations

import atexit
import logging
import math
import os
import signal
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil
import ray
from ray._private import ray_constants
from ray.exceptions import AuthenticationError

from rayrlhf.actors.placement import check_resources, promised_cpus
from rayrlhf.actors.ray_token import refusal, token_hint
from rayrlhf.config import Config
from rayrlhf.errors import ResourceError

__all__ = [
    "JOB_VARIABLE",
    "NodeResources",
    "connect",
    "disconnect",
    "end_own_ray",
    "join",
    "nodes_of",
    "resources_of_nodes",
]

# Ctrl-C promises an end within ten seconds; most of it is Ray's own shutdown.
GRACE_S = 3.0
# What Ray sets for the command of a job, and nobody else.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
KNOCK_S = 10.0
ANSWER_S = 2.0
# Ray keeps a history of every call for a dashboard, in the driver's memory too; a Ray of our own has no dashboard.
UNTOLD = {"task_events_report_interval_ms": 0}
START = "start one with `ray start --head`"
# What Ray calls the resource that says which GPUs a node has.
KIND = "accelerator_type:"


def connect(config: Config) -> None:
    """Start Ray here, or join `cluster.address`, or the cluster of the Ray job that this is; then check that it has
    what the config asks for.

    Raises:
        ResourceError: it does not.
    """
    # Ray Train looks at its workers this often; its own default makes every stage end two seconds late.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    address = config.cluster.address
    if address is None and JOB_VARIABLE in os.environ:
        address = os.environ["RAY_ADDRESS"]  # of the cluster that runs this job
    join(address, f"rayrlhf-{config.run.name}", math.ceil(promised_cpus(config)))
    try:
        check_resources(config, resources_of_nodes())
    except BaseException:
        ray.shutdown()
        raise


def join(address: str | None, namespace: str, cpus: int = 0) -> None:
    """Join the Ray at `address` (`auto`, `host:port`); None starts one here, which promises so many CPUs at least.

    Raises:
        ResourceError: no cluster answers, another server does, or the cluster refuses the token.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)  # notices of defaults; the console is the user's
    try:
        if address is not None and address != "auto":
            _knock(address)
    except OSError as error:
        raise _no_answer(address, error, START) from None
    try:
        _ray_init(address, namespace, cpus)
    except (OSError, AuthenticationError) as error:  # ConnectionError among them
        if said := refusal(error):
            where = f"cluster.address {address}" if address else "Ray cannot start here"
            raise ResourceError(f"{where}: {said}", token_hint()) from None
        cure = START if address == "auto" else "see that it is the head's port (6379), and that Ray runs there"
        raise _no_answer(address, error, cure) from None


def _no_answer(address: str | None, error: OSError | AuthenticationError, cure: str) -> ResourceError:
    return ResourceError(
        f"cluster.address {address}: no Ray cluster answers ({str(error).splitlines()[0]})",
        f"{cure}, or leave cluster.address out to start Ray here",
    )


def resources_of_nodes() -> list[dict[str, float]]:
    """CPU, GPU and custom ones of each node that is there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@dataclass(frozen=True, slots=True)
class NodeResources:
    """What a node has told Ray of itself."""

    gpus: int
    gpu_kind: str | None
    host_gib: float


def nodes_of(address: str) -> list[NodeResources]:
    """The nodes of the Ray at `address`, which is left again.

    Raises:
        ResourceError: no cluster answers.
    """
    join(address, "rayrlhf-plan")
    try:
        return [_node(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def _node(resources: Mapping[str, float]) -> NodeResources:
    kinds = [key.removeprefix(KIND) for key in resources if key.startswith(KIND)]
    memory = resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0)
    # Some kinds stand there twice, with their memory and without.
    return NodeResources(int(resources.get("GPU", 0)), max(kinds, key=len, default=None), memory / 2**30)


def _knock(address: str) -> None:
    """Ray itself would go on trying for minutes.

    Raises:
        OSError: nothing listens.
        ResourceError: something does, and speaks HTTP.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if "://" in host or (host and port.isdigit() and _speaks_http(host, int(port))):
        raise ResourceError(
            f"cluster.address {address}: not where Ray's nodes meet; a dashboard is at such an address",
            "give the head's Ray port, HEAD:6379 (http://HEAD:8265 is for submit, status, logs and stop)",
        )


def _speaks_http(host: str, port: int) -> bool:
    """Ray's own protocol begins with a frame of HTTP/2."""
    with socket.create_connection((host, port), timeout=KNOCK_S) as connection, suppress(OSError):
        connection.settimeout(ANSWER_S)  # it may say nothing: Ray's own attempt decides
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return connection.recv(7) == b"HTTP/1."
    return False


def _ray_init(address: str | None, namespace: str, cpus: int) -> None:
    local = address is None
    before = signal.getsignal(signal.SIGTERM)
    if local:
        _stay_on_loopback()
    ray.init(
        address="local" if local else address,  # None would join any cluster that runs on this machine
        namespace=namespace,
        # Roles of a synchronous step take turns, so a laptop may promise them more CPUs than it has.
        num_cpus=max(os.cpu_count() or 1, cpus) if local else None,
        include_dashboard=False if local else None,
        _system_config=dict(UNTOLD) if local else None,
        log_to_driver=False,  # actors write to files of their own
        configure_logging=False,
        logging_level=logging.ERROR,
    )
    with suppress(ValueError):  # Ray has put its own there, which exits with 15; signals reach the main thread alone
        signal.signal(signal.SIGTERM, before)


def _stay_on_loopback() -> None:
    """A Ray of our own has one node: it does as on systems where Ray makes no clusters, and listens to nobody else."""
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for Ray's own processes
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment when Ray was imported


def disconnect() -> None:
    """Leave Ray. A Ray that `connect` started ends, and every process of it: some outlive its shutdown otherwise."""
    ours = _own_ray()
    ray.shutdown()
    _, alive = psutil.wait_procs(ours, timeout=GRACE_S)
    _kill(alive)


def end_own_ray() -> None:
    """End a Ray that `connect` started without asking it: its head is lost, and who asks that waits. Ray's own shutdown
    is not called at the end of this process either."""
    atexit.unregister(ray.shutdown)
    _kill(_own_ray())


def _own_ray() -> list[psutil.Process]:
    ours: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() in ("raylet", "gcs_server"):
                ours += [child, *child.children(recursive=True)]
    return ours


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
