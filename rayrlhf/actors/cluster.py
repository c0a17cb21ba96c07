"""Joining or starting Ray, quietly, and leaving it."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
from contextlib import suppress

import psutil
import ray

from rayrlhf.actors.placement import check_resources, promised_cpus
from rayrlhf.config import Config
from rayrlhf.errors import ResourceError

__all__ = ["connect", "disconnect"]

# Ctrl-C promises an end within ten seconds; most of it is Ray's own shutdown.
GRACE_S = 3.0
# What Ray sets for the command of a job, and nobody else.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
KNOCK_S = 10.0


def connect(config: Config) -> None:
    """Start Ray here, or join `cluster.address`, or the cluster of the Ray job that this is; then check that it has
    what the config asks for.

    Raises:
        ResourceError: it does not.
    """
    # Ray Train looks at its workers this often; its own default makes every stage end two seconds late.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    local = config.cluster.address is None and JOB_VARIABLE not in os.environ
    logging.getLogger("ray").setLevel(logging.ERROR)  # notices of defaults; the console is the user's
    _init(config, local, math.ceil(promised_cpus(config)))
    try:
        check_resources(config, ray.cluster_resources())
    except BaseException:
        ray.shutdown()
        raise


def _init(config: Config, local: bool, cpus: int) -> None:
    try:
        if config.cluster.address not in (None, "auto"):
            _knock(config.cluster.address)
        _ray_init(config, local, cpus)
    except OSError as error:  # ConnectionError among them
        raise ResourceError(
            f"cluster.address {config.cluster.address}: no Ray cluster answers ({str(error).splitlines()[0]})",
            "start one with `ray start --head`, or leave cluster.address out to start Ray here",
        ) from None


def _knock(address: str) -> None:
    """Raises OSError at once where nothing listens: Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


def _ray_init(config: Config, local: bool, cpus: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ray.init(
        # None would join any cluster that runs on this machine.
        address="local" if local else config.cluster.address or os.environ["RAY_ADDRESS"],
        namespace=f"rayrlhf-{config.run.name}",
        # Roles of a synchronous step take turns, so a laptop may promise them more CPUs than it has.
        num_cpus=max(os.cpu_count() or 1, cpus) if local else None,
        include_dashboard=False if local else None,
        log_to_driver=False,  # actors write to files of their own
        configure_logging=False,
        logging_level=logging.ERROR,
    )
    with suppress(ValueError):  # Ray has put its own there, which exits with 15; signals reach the main thread alone
        signal.signal(signal.SIGTERM, before)


def disconnect() -> None:
    """Leave Ray. A Ray that `connect` started ends, and every process of it: some outlive its shutdown otherwise."""
    ours: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() in ("raylet", "gcs_server"):
                ours += [child, *child.children(recursive=True)]
    ray.shutdown()
    _, alive = psutil.wait_procs(ours, timeout=GRACE_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
