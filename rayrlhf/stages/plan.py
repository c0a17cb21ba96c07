"""The plan of a dry run: of the config, on the machine or the GPUs at hand."""

from __future__ import annotations

import torch
from rich.console import Console

from rayrlhf.config import Config
from rayrlhf.planning.command import asked_of
from rayrlhf.planning.plan import Plan, make_plan
from rayrlhf.planning.remedies import check_fits
from rayrlhf.planning.show import show_plan

__all__ = ["show_and_check"]

# What the driver calls a GPU, and the table.
NAMES = {"H200": "h200-141g", "H100": "h100-80g", "A800": "a800-80g", "A100": "a100-80g"}


def show_and_check(console: Console, config: Config) -> None:
    """Print what PPO takes in memory and time, where the run has PPO.

    Raises:
        ResourceError: it does not fit: which role, how many GiB over, and three changes that would help.
    """
    if "ppo" not in config.stages():
        return
    hardware = config.plan.hardware or _at_hand(config)

    def planned(other: Config) -> Plan:
        asked = asked_of(other, hardware)
        return make_plan(asked.work, asked.hardware, asked.assume, asked.nodes)

    plan = planned(config)
    show_plan(console, plan)
    console.print("what this rests on: `rayrlhf plan` with the same config", highlight=False)
    if config.cluster.device == "cpu" and config.cluster.address is not None:
        console.print("the memory of the cluster's nodes is not known here: not checked", highlight=False)
        return
    check_fits(config, plan, planned)


def _at_hand(config: Config) -> str | None:
    """The table's name of this machine's GPU, if it has one that is known; else the plan's own choice."""
    if config.cluster.device == "cpu" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    for part, name in NAMES.items():
        if part in properties.name:
            return "a100-40g" if name == "a100-80g" and properties.total_memory < 48 * 2**30 else name
    return None
