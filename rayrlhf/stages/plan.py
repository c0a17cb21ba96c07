"""The plan of a dry run: of the config, on the machine or the GPUs at hand."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console

from rayrlhf.actors.cluster import JOB_VARIABLE, NodeResources, nodes_of
from rayrlhf.config import Config
from rayrlhf.errors import ModelError, ResourceError
from rayrlhf.planning.command import asked_of
from rayrlhf.planning.hardware import GIB, Hardware
from rayrlhf.planning.plan import Plan, make_plan
from rayrlhf.planning.reading import TRAINING
from rayrlhf.planning.remedies import check_fits
from rayrlhf.planning.show import show_plan, show_training

__all__ = ["show_and_check"]

# What the driver, or Ray, calls a GPU, and the table.
NAMES = {"H200": "h200-141g", "H100": "h100-80g", "A800": "a800-80g", "A100": "a100-80g"}


@dataclass(frozen=True, slots=True)
class _GPUs:
    """Those that the run would get."""

    title: str
    name: str | None
    """in the table; None if it lacks them"""
    per_node: int
    """0: as many cores as this machine"""
    nodes: int
    host_gib: float
    """of a node; 0: this machine's"""
    memory_gib: float | None = None
    """None: the table's"""


def show_and_check(console: Console, config: Config) -> None:
    """Print what PPO takes in memory and time; of a run without it, what its supervised stages take in memory.

    Raises:
        ResourceError: it does not fit: which role, how many GiB over, and three changes that would help.
    """
    has_ppo = "ppo" in config.stages()
    if not has_ppo and not set(config.stages()) & set(TRAINING):
        return
    is_known = True
    try:
        gpus = _at_hand(config)
    except ResourceError as error:  # from where the plan is made the cluster may be out of reach
        console.print(f"not checked against the cluster: {error.message}", highlight=False, markup=False)
        gpus, is_known = None, config.cluster.device == "cuda"  # of a CPU this machine says nothing of the cluster's
    planned = partial(_planned, gpus=gpus)
    try:
        plan = planned(config)
    except ModelError as error:  # the run itself may well know a model that the plan's arithmetic does not
        console.print(f"no plan, and no check that it fits: {error.message}", highlight=False, markup=False)
        return
    (show_plan if has_ppo else show_training)(console, plan)
    console.print("what this rests on: `rayrlhf plan` with the same config", highlight=False)
    if is_known:
        check_fits(config, plan, planned)


def _planned(config: Config, gpus: _GPUs | None) -> Plan:
    asked = asked_of(config, config.plan.hardware or (gpus.name if gpus else None))
    hardware, nodes = asked.hardware, asked.nodes
    if gpus is not None and not config.plan.hardware:
        hardware, nodes = _with(hardware, gpus), nodes or gpus.nodes
    plan = make_plan(asked.work, hardware, asked.assume, nodes, asked.others)
    if "ppo" in config.stages():
        return plan
    alone = tuple(short for short in plan.shortfalls if short.roles == ("train",))
    return replace(plan, shortfalls=alone, warnings=())


def _at_hand(config: Config) -> _GPUs | None:
    """The cluster's GPUs, or this machine's; of a run without GPUs the cluster's memory. None: what this machine has.

    Raises:
        ResourceError: the cluster does not answer, or its GPUs are not all of one kind.
    """
    address = config.cluster.address or (os.environ.get("RAY_ADDRESS") if JOB_VARIABLE in os.environ else None)
    if address is not None:
        nodes = nodes_of(address)
        return _of_cluster(nodes) if config.cluster.device == "cuda" else _memory_of_cluster(nodes)
    if config.cluster.device == "cpu" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    memory_gib = properties.total_memory / GIB
    return _GPUs(properties.name, _known(properties.name, memory_gib), torch.cuda.device_count(), 1, 0.0, memory_gib)


def _of_cluster(nodes: list[NodeResources]) -> _GPUs:
    with_gpus = [node for node in nodes if node.gpus >= 1]
    kinds = {(node.gpu_kind, node.gpus) for node in with_gpus}
    if len(kinds) != 1:
        found = ", ".join(f"{count} x {kind or 'unknown'}" for kind, count in sorted(kinds, key=str)) or "none"
        raise ResourceError(f"its nodes have GPUs of {found}, and the plan is for equal nodes", "set plan.hardware")
    ((kind, count),) = kinds
    name = _known(kind or "", None)
    if name is None and kind and "A100" in kind:  # Ray calls those of 40 GB and of 80 by one name
        raise ResourceError(f"its GPUs are {kind}, of 40 or 80 GB", "set plan.hardware to a100-40g or a100-80g")
    if name is None:
        raise ResourceError(f"its GPUs are {kind or 'of unknown kind'}, which the table lacks", "set plan.hardware")
    return _GPUs(f"{kind} of the cluster", name, count, len(with_gpus), min(node.host_gib for node in with_gpus))


def _memory_of_cluster(nodes: list[NodeResources]) -> _GPUs:
    """All nodes' together: where each process will sit, Ray decides."""
    together = sum(node.host_gib for node in nodes)
    if together == 0:
        raise ResourceError("its nodes do not say how much memory they have")
    return _GPUs("the cluster's CPU", "cpu", 0, 1, together)


def _known(title: str, memory_gib: float | None) -> str | None:
    """The table's name of a GPU; None too where it comes in two sizes and nobody says which."""
    words = re.split(r"[^A-Za-z0-9]+", title)
    name = next((name for part, name in NAMES.items() if part in words), None)
    if name != "a100-80g":
        return name
    if memory_gib is None:
        said = {"40G": 40.0, "40GB": 40.0, "80G": 80.0, "80GB": 80.0}
        memory_gib = next((said[word] for word in words if word in said), None)
    if memory_gib is None:
        return None
    return "a100-40g" if memory_gib < 48 else name


def _with(hardware: Hardware, gpus: _GPUs) -> Hardware:
    """As many GPUs as there are, with their memory and their nodes'; how fast they are the table says."""
    there = {"title": gpus.title, "host_gib": gpus.host_gib, "per_node": gpus.per_node}
    if gpus.memory_gib is not None:
        there["memory_gib"] = gpus.memory_gib
    return hardware.model_copy(update={"device": hardware.device.model_copy(update=there)})
