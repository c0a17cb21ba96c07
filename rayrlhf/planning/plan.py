"""The plan: memory and time of a workload on given hardware, what does not fit, and how it would be said in JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayrlhf.planning.assumptions import Assumptions
from rayrlhf.planning.hardware import GIB, Hardware
from rayrlhf.planning.memory import RankMemory, beyond_engine, kv_bytes_per_token, rank_memory, set_peak
from rayrlhf.planning.time import StepTime, step_time
from rayrlhf.planning.workload import Role, Workload

__all__ = ["Plan", "Shortfall", "make_plan", "nodes_taken", "too_long"]

# Of the host's memory, a process with its libraries.
PROCESS_BYTES = GIB


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Something that does not fit."""

    roles: tuple[str, ...]
    over: float
    """bytes (of memory), devices (where there are too few), tokens or heads over what there is"""
    message: str


@dataclass(frozen=True, slots=True)
class Plan:
    work: Workload
    hardware: Hardware
    assume: Assumptions
    nodes: int
    memory: Mapping[str, RankMemory]
    """by role, of one device"""
    time: StepTime
    shortfalls: tuple[Shortfall, ...]
    warnings: tuple[str, ...]
    others_s: float = 0.0
    """of PPO's other arms, which come one after the other"""

    @property
    def fits(self) -> bool:
        return not self.shortfalls

    @property
    def devices(self) -> float:
        return self.work.devices()

    @property
    def seconds(self) -> float:
        return self.time.seconds * self.work.steps + self.others_s

    @property
    def gpu_hours(self) -> float:
        return self.devices * self.seconds / 3600 if self.work.gpu else 0.0

    def as_json(self) -> dict[str, Any]:
        roles = {**self.work.roles, **({"train": self.work.train} if self.work.train else {})}
        return {
            "fits": self.fits,
            "shortfalls": [{"roles": list(s.roles), "over": s.over, "message": s.message} for s in self.shortfalls],
            "warnings": list(self.warnings),
            "step_seconds": self.time.seconds,
            "steps": self.work.steps,
            "days": self.seconds / 86400,
            "gpus": self.devices if self.work.gpu else 0,
            "nodes": self.nodes,
            "gpu_hours": self.gpu_hours,
            "hardware": self.hardware.name,
            "roles": {name: self._role(role) for name, role in roles.items()},
            "phases": {phase: {"seconds": seconds} for phase, seconds in self.time.phases.items()},
            "assumptions": self.assume.as_json(),
        }

    def _role(self, role: Role) -> dict[str, Any]:
        memory = self.memory[role.name]
        return {
            "gpus": role.ranks * role.devices if self.work.gpu else 0,
            "ranks": role.ranks,
            "zero_stage": role.zero_stage,
            "parameters": role.shape.parameters,
            "active_parameters": role.shape.active,
            "gib_per_gpu": memory.peak / GIB,
            "parts_gib": {name: nbytes / GIB for name, nbytes in memory.parts().items()},
            "host_gib_per_rank": sum(memory.host.values()) / GIB,
            "shared_memory_gib": memory.segments / GIB,
        }


def make_plan(
    work: Workload, hardware: Hardware, assume: Assumptions, nodes: int | None = None, others: Sequence[Workload] = ()
) -> Plan:
    """Arithmetic only: no device is touched.

    Args:
        nodes: that there are; None: as many as the roles take.
        others: what comes before or after `work` in the same place: it has to fit too, and takes its time.
    """
    plan = _planned(work, hardware, assume, nodes)
    for other in others:
        plan = _both(plan, _planned(other, hardware, assume, nodes))
    return plan


def _both(plan: Plan, other: Plan) -> Plan:
    """Of two arms, what the one that takes more takes of each role's memory, and the seconds of both."""
    fuller = {n: max(m, other.memory.get(n, m), key=lambda memory: memory.peak) for n, m in plan.memory.items()}
    worst = {short.roles: short for short in sorted((*plan.shortfalls, *other.shortfalls), key=lambda s: s.over)}
    warnings = tuple(dict.fromkeys((*plan.warnings, *other.warnings)))
    seconds = plan.others_s + other.seconds
    return replace(plan, memory=fuller, shortfalls=tuple(worst.values()), warnings=warnings, others_s=seconds)


def _planned(work: Workload, hardware: Hardware, assume: Assumptions, nodes: int | None) -> Plan:
    memory = {name: rank_memory(role, work, hardware, assume) for name, role in work.roles.items()}
    if work.train is not None:
        memory["train"] = rank_memory(work.train, work, hardware, assume)
    found = nodes or nodes_taken(work, hardware)
    shortfalls = [*too_long(work), *_devices_missing(work, hardware, found), *_over(work, hardware, assume, memory)]
    time = step_time(work, hardware, assume, memory)
    warnings = tuple(_warnings(work, time))
    return Plan(work, hardware, assume, found, memory, time, tuple(shortfalls), warnings)


def nodes_taken(work: Workload, hardware: Hardware) -> int:
    """By the largest stage, when its roles fill one node after the other."""
    if not work.gpu:
        return 1
    return max(1, math.ceil(max(work.devices(), _trained_on(work)) / hardware.per_node - 1e-9))


def too_long(work: Workload) -> list[Shortfall]:
    shape = work.roles["policy"].shape
    over = work.longest - (shape.context or work.longest)
    if over <= 0:
        return []
    more = "one" if over == 1 else str(over)
    message = (
        f"policy: {work.longest} tokens of prompt and response, {more} more than the {shape.context} of {shape.name}"
    )
    return [Shortfall(("policy",), over, message)]


def _devices_missing(work: Workload, hardware: Hardware, nodes: int) -> list[Shortfall]:
    there = nodes * hardware.per_node
    have = f"{nodes} {_nodes(nodes)} of {hardware.per_node} have {there}"
    found, asked, trained = [], work.devices(), _trained_on(work)
    if work.gpu and asked > there:
        found.append(Shortfall(tuple(work.roles), asked - there, f"the roles take {asked:g} GPUs, {have}"))
    if work.gpu and trained > there:
        found.append(Shortfall(("train",), trained - there, f"train: {trained:g} GPUs, {have}"))
    return [*found, *_engines_without_a_node(work, hardware, nodes)]


def _engines_without_a_node(work: Workload, hardware: Hardware, nodes: int) -> list[Shortfall]:
    """The shards of an engine are processes of one actor: they share a node."""
    rollout = work.roles["rollout"]
    shards = rollout.devices if work.gpu else 1.0
    if shards > hardware.per_node:
        message = f"rollout: the {shards:g} GPUs of an engine share a node, which has {hardware.per_node}"
        return [Shortfall(("rollout",), shards - hardware.per_node, message)]
    room = nodes * int(hardware.per_node / shards + 1e-9)
    if not work.gpu or rollout.ranks <= room or work.devices() > nodes * hardware.per_node:
        return []
    message = (
        f"rollout: {rollout.ranks} engines of {shards:g} GPUs on one node each, and {nodes} {_nodes(nodes)} of "
        f"{hardware.per_node} have room for {room}"
    )
    return [Shortfall(("rollout",), rollout.ranks - room, message)]


def _trained_on(work: Workload) -> float:
    """GPUs of the supervised stages' workers, which come before the roles and have the cluster to themselves."""
    return work.train.ranks * work.train.devices if work.train else 0.0


def _over(work: Workload, hardware: Hardware, assume: Assumptions, memory: Mapping[str, RankMemory]) -> list[Shortfall]:
    if not work.gpu:
        return _over_on_a_cpu(work, hardware, memory)
    found = []
    usable = hardware.memory_bytes * (1 - assume["fragmentation"])
    for roles in [*work.device_sets(), *([("train",)] if work.train else [])]:
        role = work.train if roles == ("train",) and work.train else work.roles[roles[0]]
        room, when = usable * min(1.0, role.devices), ""
        if roles == ("rollout",):
            over, room, when = beyond_engine(memory["rollout"], role, work, hardware, assume)
        else:
            over = set_peak({name: memory[name] for name in roles}) - room
        if over > 1:
            found.append(Shortfall(roles, over, _too_large(roles, over, room, hardware, when)))
    found += [*_cache_too_small(work, memory), *_heads_left_over(work), *_host_too_small(work, hardware, memory)]
    return found


def _too_large(roles: tuple[str, ...], over: float, room: float, hardware: Hardware, when: str) -> str:
    who = " and ".join(roles)
    needs, title = (over + room) / GIB, hardware.device.title
    more = f"{over / GIB:.1f} more than the {room / GIB:.1f} usable of {title}"
    return f"{who}: {needs:.1f} GiB a GPU{when}, {more}"


def _cache_too_small(work: Workload, memory: Mapping[str, RankMemory]) -> list[Shortfall]:
    """One sequence of the longest prompt and response must fit in an engine's key/value cache."""
    role = work.roles["rollout"]
    shards = max(1.0, role.devices) if work.gpu else 1.0
    needed = kv_bytes_per_token(role.shape, work.dtype_bytes, shards) * work.longest / shards
    over = needed - memory["rollout"].weights["key/value cache"]
    if over <= 0:
        return []
    message = f"rollout: the key/value cache lacks {over / GIB:.2f} GiB for one sequence of {work.longest} tokens"
    return [Shortfall(("rollout",), over, message)]


def _heads_left_over(work: Workload) -> list[Shortfall]:
    """vLLM refuses an engine whose shards do not divide the attention heads."""
    rollout = work.roles["rollout"]
    heads, shards = rollout.shape.heads, max(1, round(rollout.devices))
    if heads % shards == 0:
        return []
    message = f"rollout: {heads} attention heads do not divide among {shards} GPUs of an engine"
    return [Shortfall(("rollout",), heads % shards, message)]


def _host_too_small(work: Workload, hardware: Hardware, memory: Mapping[str, RankMemory]) -> list[Shortfall]:
    """What a node's processes hold in its own memory: what is offloaded, and what waits while others have a device."""
    return [
        *_over_on_a_node(work, hardware, memory),
        *_over_on_a_training_node(work, hardware, memory),
        *_over_at_the_start(work, hardware, memory),
    ]


def _over_at_the_start(work: Workload, hardware: Hardware, memory: Mapping[str, RankMemory]) -> list[Shortfall]:
    """Models are read in float32 before they go to a device; under ZeRO-3 by rank 0 alone."""
    found = []
    for name, role in {**work.roles, **({"train": work.train} if work.train else {})}.items():
        readers = 1 if role.zero_stage == 3 else min(role.ranks, hardware.per_node)
        over = readers * memory[name].loading - hardware.host_bytes
        if over > 0:
            message = (
                f"{name}: {'rank 0 reads' if readers == 1 else 'each rank reads'} the whole model in float32 into the "
                f"host's memory, {readers * memory[name].loading / GIB:.0f} GiB a node, which has "
                f"{hardware.host_bytes / GIB:.0f}"
            )
            found.append(Shortfall((name,), over, message))
    return found


def _over_on_a_training_node(work: Workload, hardware: Hardware, memory: Mapping[str, RankMemory]) -> list[Shortfall]:
    if work.train is None:
        return []
    total = min(work.train.ranks, hardware.per_node) * _on_the_host("train", memory["train"], waits=False)
    return _beyond_the_host(("train",), total, hardware)


def _over_on_a_node(work: Workload, hardware: Hardware, memory: Mapping[str, RankMemory]) -> list[Shortfall]:
    per_device: list[tuple[float, float, tuple[str, ...]]] = []
    for roles in work.device_sets():
        held = sum(_on_the_host(name, memory[name], waits=len(roles) > 1) for name in roles)
        per_device.append((held, max(work.roles[r].ranks * work.roles[r].devices for r in roles), roles))
    total, free, here = 0.0, float(hardware.per_node), list[str]()
    for held, devices, roles in sorted(per_device, reverse=True):  # the fullest node there can be
        if free > 0:
            # Rank 0 of the policy sits on one node.
            total += memory["policy"].segments if "policy" in roles else 0.0
            total += held * min(devices, free)
            free -= devices
            here += [name for name in roles if held > len(roles) * PROCESS_BYTES]
    return _beyond_the_host(tuple(here), total, hardware)


def _beyond_the_host(roles: tuple[str, ...], total: float, hardware: Hardware) -> list[Shortfall]:
    over = total - hardware.host_bytes
    if over <= 0:
        return []
    message = (
        f"{' and '.join(roles)}: {total / GIB:.0f} GiB in a node's own memory, {over / GIB:.0f} more than the "
        f"{hardware.host_bytes / GIB:.0f} there are"
    )
    return [Shortfall(roles, over, message)]


def _on_the_host(role: str, memory: RankMemory, waits: bool) -> float:
    """Of one device's rank: what is offloaded, what waits while others work, and the process itself."""
    kept = memory.weights["weights"] if role == "rollout" else memory.resident - memory.stays
    return sum(memory.host.values()) + (kept if waits else 0.0) + PROCESS_BYTES


def _over_on_a_cpu(work: Workload, hardware: Hardware, memory: Mapping[str, RankMemory]) -> list[Shortfall]:
    """All processes share the machine's memory, or the cluster's."""
    owner = hardware.device.title.removesuffix(" CPU")
    found = []
    groups = {"the roles": {name: work.roles[name] for name in work.roles}}
    if work.train is not None:
        groups["train"] = {"train": work.train}
    for roles in groups.values():
        held = {name: role.ranks * memory[name].peak + memory[name].segments for name, role in roles.items()}
        over = sum(held.values()) - hardware.host_bytes
        if over > 0:
            parts = ", ".join(f"{name} {nbytes / GIB:.1f}" for name, nbytes in held.items())
            found.append(
                Shortfall(
                    tuple(sorted(held, key=lambda name: -held[name])),
                    over,
                    f"{parts}: {sum(held.values()) / GIB:.1f} GiB, {over / GIB:.1f} more than {owner} "
                    f"{hardware.host_bytes / GIB:.1f}",
                )
            )
    found += _cache_too_small(work, memory)
    return found


def _warnings(work: Workload, time: StepTime) -> list[str]:
    found = []
    rollout = work.roles["rollout"]
    wanted = min(work.max_sequences, -(-work.batch_size // rollout.ranks))
    if time.generation.places < wanted:
        found.append(
            f"rollout: the key/value cache holds {time.generation.places} sequences at once, {wanted} are asked for"
        )
    return found


def _nodes(count: int) -> str:
    return "node" if count == 1 else "nodes"
