"""Joining or starting Ray, quietly, and leaving it."""

from __future__ import annotations

import logging
import math
import os
from contextlib import suppress

import psutil
import ray

from rayrlhf.actors.placement import check_resources, required
from rayrlhf.config import Config

__all__ = ["connect", "disconnect"]

# Ctrl-C promises an end within ten seconds; most of it is Ray's own shutdown.
GRACE_S = 3.0


def connect(config: Config) -> None:
    """Start Ray here, or join `cluster.address`; then check that it has what the config asks for.

    Raises:
        ResourceError: it does not.
    """
    # Ray Train looks at its workers this often; its own default makes every stage end two seconds late.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    local = config.cluster.address is None
    logging.getLogger("ray").setLevel(logging.ERROR)  # notices of defaults; the console is the user's
    needs = required(config)
    ray.init(
        address=None if local else config.cluster.address,
        namespace=f"rayrlhf-{config.run.name}",
        # Roles of a synchronous step take turns, so a laptop may promise them more CPUs than it has.
        num_cpus=max(os.cpu_count() or 1, math.ceil(needs["CPU"])) if local else None,
        include_dashboard=False if local else None,
        log_to_driver=False,  # actors write to files of their own
        configure_logging=False,
        logging_level=logging.ERROR,
    )
    try:
        check_resources(config, ray.cluster_resources())
    except BaseException:
        ray.shutdown()
        raise


def disconnect() -> None:
    """Leave Ray. A Ray that `connect` started ends, and every process of it: some outlive its shutdown otherwise."""
    roots = [p for p in psutil.Process().children() if p.name() in ("raylet", "gcs_server")]
    ours = [p for root in roots for p in (root, *root.children(recursive=True))]
    ray.shutdown()
    _, alive = psutil.wait_procs(ours, timeout=GRACE_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
