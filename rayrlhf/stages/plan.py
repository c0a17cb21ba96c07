"""The plan of a dry run: of the config, on the machine or the GPUs at hand."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from rich.console import Console

from rayrlhf.config import Config
from rayrlhf.errors import ModelError
from rayrlhf.planning.command import asked_of
from rayrlhf.planning.hardware import GIB, Hardware
from rayrlhf.planning.plan import Plan, make_plan
from rayrlhf.planning.remedies import TRAINING, check_fits
from rayrlhf.planning.show import show_plan, show_training

__all__ = ["show_and_check"]

# What the driver calls a GPU, and the table.
NAMES = {"H200": "h200-141g", "H100": "h100-80g", "A800": "a800-80g", "A100": "a100-80g"}


def show_and_check(console: Console, config: Config) -> None:
    """Print what PPO takes in memory and time; of a run without it, what its supervised stages take in memory.

    Raises:
        ResourceError: it does not fit: which role, how many GiB over, and three changes that would help.
    """
    has_ppo = "ppo" in config.stages()
    if not has_ppo and not set(config.stages()) & set(TRAINING):
        return
    try:
        plan = _planned(config)
    except ModelError as error:  # the run itself may well know a model that the plan's arithmetic does not
        console.print(f"no plan, and no check that it fits: {error.message}", highlight=False, markup=False)
        return
    (show_plan if has_ppo else show_training)(console, plan)
    console.print("what this rests on: `rayrlhf plan` with the same config", highlight=False)
    if config.cluster.device == "cpu" and config.cluster.address is not None:
        console.print("the memory of the cluster's nodes is not known here: not checked", highlight=False)
        return
    check_fits(config, plan, _planned)


def _planned(config: Config) -> Plan:
    asked = asked_of(config, config.plan.hardware or _at_hand(config))
    hardware, nodes = asked.hardware, asked.nodes
    if _is_here(config):
        hardware, nodes = _with_what_is_here(hardware), nodes or 1
    plan = make_plan(asked.work, hardware, asked.assume, nodes)
    if "ppo" in config.stages():
        return plan
    alone = tuple(short for short in plan.shortfalls if short.roles == ("train",))
    return replace(plan, shortfalls=alone, warnings=())


def _at_hand(config: Config) -> str | None:
    """The table's name of this machine's GPU, if it has one that is known; else the plan's own choice."""
    if config.cluster.device == "cpu" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    for part, name in NAMES.items():
        if part in properties.name:
            return "a100-40g" if name == "a100-80g" and properties.total_memory < 48 * GIB else name
    return None


def _is_here(config: Config) -> bool:
    """Whether the run would start a Ray of its own on this machine's GPUs, and they are what it is planned for."""
    joins = config.cluster.address is not None or "RAY_ADDRESS" in os.environ
    return config.cluster.device == "cuda" and not joins and not config.plan.hardware and torch.cuda.is_available()


def _with_what_is_here(hardware: Hardware) -> Hardware:
    """As many GPUs as this machine has, with their memory and the machine's own; how fast they are the table says."""
    properties = torch.cuda.get_device_properties(0)
    here = {
        "title": properties.name,
        "memory_gib": properties.total_memory / GIB,
        "host_gib": 0.0,
        "per_node": torch.cuda.device_count(),
    }
    return hardware.model_copy(update={"device": hardware.device.model_copy(update=here)})
