"""Devices and the links between them: the table in hardware.yaml, and users' own in the same form."""

from __future__ import annotations

import difflib
import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rayrlhf.config.base import NonNegative, NonNegativeInt, Positive, Section
from rayrlhf.config.load import read_yaml, validated
from rayrlhf.errors import ConfigError

__all__ = ["Hardware", "Link", "hardware_named", "known_hardware"]

GIB = 2**30


class Link(Section):
    gb_s: Positive
    """10^9 bytes a second in one direction, for each device, or for a node if `of_node`"""
    of_node: bool = False
    """the devices of a node have it together"""
    latency_us: NonNegative
    source: str

    def seconds(self, nbytes: float, share: float) -> float:
        """To send `nbytes` at `share` of the rated speed."""
        return nbytes / (self.gb_s * 1e9 * share) + self.latency_us * 1e-6


class _Flops(Section):
    bfloat16: Positive
    float32: Positive


class Device(Section):
    """One entry of the table."""

    kind: Literal["gpu", "cpu"]
    title: str
    memory_gib: NonNegative
    """of one GPU; of a CPU machine 0: read from the machine"""
    host_gib: NonNegative
    """of a node; 0: read from the machine"""
    tflops: _Flops
    """dense, by dtype; of a CPU per core"""
    memory_gb_s: Positive
    """of one GPU; of a CPU per core"""
    per_node: NonNegativeInt
    """GPUs of a node, or cores; 0: read from the machine"""
    within: str
    """the link between the devices of a node ..."""
    between: str
    """... those of different nodes ..."""
    host: str
    """... and to the host's memory"""
    source: str

    @model_validator(mode="after")
    def _gpus_are_not_read_from_this_machine(self) -> Device:
        missing = [key for key in ("memory_gib", "per_node") if self.kind == "gpu" and not getattr(self, key)]
        if missing:
            raise ValueError(f"{missing[0]} is 0, and kind is gpu: say how much a GPU, or a node, has")
        return self


class _Table(Section):
    links: dict[str, Link] = Field(default_factory=dict)
    devices: dict[str, Device]
    assumptions: dict[str, float] = Field(default_factory=dict)
    """What was measured of this hardware in place of the plan's own assumptions."""


class Hardware(Section):
    """A device with its links resolved."""

    name: str
    device: Device
    within: Link
    between: Link
    host: Link
    assumptions: dict[str, float] = Field(default_factory=dict)
    file: str = ""
    """that it was read from, if it is not of the table"""

    @property
    def is_gpu(self) -> bool:
        return self.device.kind == "gpu"

    @property
    def per_node(self) -> int:
        return self.device.per_node or len(os.sched_getaffinity(0))

    @property
    def host_bytes(self) -> float:
        return (self.device.host_gib or _memory_here_gib()) * GIB

    @property
    def memory_bytes(self) -> float:
        """Of one GPU; a CPU's processes share the host's."""
        return self.device.memory_gib * GIB if self.is_gpu else self.host_bytes

    def flops(self, dtype: str) -> float:
        return float(getattr(self.device.tflops, dtype)) * 1e12

    @property
    def bandwidth(self) -> float:
        return self.device.memory_gb_s * 1e9

    def link(self, devices: int) -> Link:
        """The slowest link among so many neighbouring devices."""
        return self.within if devices <= self.per_node else self.between


def known_hardware() -> dict[str, Device]:
    return _builtin().devices


def hardware_named(name: str) -> Hardware:
    """A device of the table, or the first of a YAML file of the same form.

    Raises:
        ConfigError: there is none, or the file is not of this form.
    """
    if name.endswith((".yaml", ".yml")):
        own = validated(_Table, read_yaml(Path(name)), name)
        first = next(iter(own.devices), None)
        if first is None:
            raise ConfigError(f"{name}: devices is empty", "describe one as rayrlhf/planning/hardware.yaml does")
        found = _resolved(first, own.devices[first], _builtin().links | own.links, own.assumptions, name)
        return found.model_copy(update={"file": name})
    table = _builtin()
    if name not in table.devices:
        near = difflib.get_close_matches(name, table.devices, n=1, cutoff=0.5)
        known = f"did you mean {near[0]}?" if near else f"one of {', '.join(table.devices)}, or a YAML file"
        raise ConfigError(f"{name}: no such hardware (--hardware, plan.hardware, or a form's hardware)", known)
    return _resolved(name, table.devices[name], table.links, {}, "hardware")


def _resolved(
    name: str, device: Device, links: dict[str, Link], assumptions: dict[str, float], source: str
) -> Hardware:
    found: dict[str, Any] = {}
    for place in ("within", "between", "host"):
        wanted = getattr(device, place)
        if wanted not in links:
            raise ConfigError(f"{source}: devices.{name}.{place}: no link {wanted!r}", f"one of {', '.join(links)}")
        found[place] = links[wanted]
    return Hardware(name=name, device=device, assumptions=assumptions, **found)


@cache
def _builtin() -> _Table:
    with_path = files("rayrlhf.planning").joinpath("hardware.yaml")
    return validated(_Table, read_yaml(Path(str(with_path))), "hardware.yaml")


def _memory_here_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
