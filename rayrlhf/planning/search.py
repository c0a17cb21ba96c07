"""Placements of a workload on GPUs, the fastest first; or the fewest GPUs that it fits on.

What is tried: who shares devices with whom (`SETS`), ranks of each set, ZeRO stages, tensor parallelism, tokens of a
micro-batch, activation checkpointing, and only where nothing else fits an optimizer on the host. Memory decides before
time is looked at; the roles' times are looked up rank by rank, and only the best placements are planned as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rayrlhf.errors import ConfigError
from rayrlhf.planning.assumptions import Assumptions
from rayrlhf.planning.decoding import Generation, generate_seconds
from rayrlhf.planning.hardware import Hardware
from rayrlhf.planning.memory import RankMemory, beyond_engine, kv_bytes_per_token, rank_memory, set_peak
from rayrlhf.planning.plan import Plan, make_plan
from rayrlhf.planning.time import RoleClock
from rayrlhf.planning.workload import Role, Workload, fitting_transport

__all__ = ["SETS", "overrides_of", "search", "smallest"]

RANKS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SHARDS = (1, 2, 4, 8)
UTILIZATION = (0.9, 0.7, 0.5, 0.3)
PHASES = ("generate", "score", "update", "move")
Sets = tuple[tuple[str, ...], ...]
# Who takes turns on the same GPUs; whoever is not named has its own.
SETS: tuple[Sets, ...] = (
    (),
    (("policy", "reference"), ("value", "reward")),
    (("reference", "reward"),),
    (("policy", "value", "reference", "reward"),),
    (("policy", "value", "reference", "reward", "rollout"),),
)


@dataclass(frozen=True, slots=True)
class _Place:
    """A set of roles on so many ranks, by itself."""

    roles: Mapping[str, Role]
    gpus: float
    score: float
    update: float
    generate: float = 0.0
    move: float = 0.0


def search(work: Workload, hardware: Hardware, assume: Assumptions, nodes: int, gpus: int | None = None) -> list[Plan]:
    """Placements that fit, the fastest first; after it those that are slower and take fewer GPUs. None where none fits.

    Args:
        gpus: at most so many of the nodes'.
    """
    budget = gpus or nodes * hardware.per_node
    work = replace(work, hpz=1, offload_param=False)  # which hold for some stages and numbers of ranks alone
    for offload in (False, True):
        best: dict[tuple[float, Sets, bool], tuple[float, Workload]] = {}
        for candidate, seconds in _candidates(replace(work, offload_optimizer=offload), hardware, assume, budget):
            key = (candidate.devices(), candidate.shared, candidate.checkpointing)
            if key not in best or seconds < best[key][0]:
                best[key] = (seconds, candidate)
        plans = [make_plan(candidate, hardware, assume, nodes) for _, candidate in best.values()]
        # The supervised stages' workers are not what is placed here; but what helps them is taken where it can be.
        without = [plan for plan in plans if all(short.roles == ("train",) for short in plan.shortfalls)]
        if fitting := [plan for plan in without if plan.fits] or without:
            return _frontier(fitting)
    return []


def _frontier(plans: Sequence[Plan]) -> list[Plan]:
    """Without those that others beat in time with no more GPUs."""
    found: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.time.seconds, plan.devices)):
        if not found or plan.devices < found[-1].devices:
            found.append(plan)
    return found


def smallest(work: Workload, hardware: Hardware, assume: Assumptions) -> list[Plan]:
    """As `search`, on the fewest GPUs on which anything fits (of 1, 2, 4, 8, ... and whole nodes)."""
    for gpus in RANKS:
        if plans := search(work, hardware, assume, -(-gpus // hardware.per_node), gpus):
            return plans
    return []


def overrides_of(plan: Plan, asked: Workload | None = None) -> list[str]:
    """The config keys that say this placement.

    Args:
        asked: what it was searched for, whose own keys may have to go.
    """
    work, roles = plan.work, plan.work.roles
    names = [name for name in ("policy", "value", "reference", "reward") if name in roles]
    keys = {f"cluster.{name}.ranks": roles[name].ranks for name in names}
    # One rank has nothing to shard, whatever is said of all learners, or of all others.
    learners = max(role.zero_stage for role in roles.values() if role.learns)
    frozen = max(roles[name].zero_stage for name in ("reference", "reward") if name in roles)
    shared = ", ".join(f"[{', '.join(members)}]" for members in work.shared)
    return [
        *(f"{key}={value}" for key, value in keys.items()),
        f"cluster.shared=[{shared}]",
        f"weights.transport={work.transport}",
        f"rollout.engines={roles['rollout'].ranks}",
        f"rollout.tensor_parallel={roles['rollout'].devices:g}",
        f"rollout.gpu_memory_utilization={work.gpu_memory_utilization:g}",
        f"ppo.zero_stage={learners}",
        f"ppo.frozen_zero_stage={frozen}",
        f"ppo.micro_batch_tokens={work.micro_batch_tokens}",
        f"deepspeed.activation_checkpointing={str(work.checkpointing).lower()}",
        f"deepspeed.offload_optimizer={'cpu' if work.offload_optimizer else 'none'}",
        *(_undone(asked, names) if asked else ()),
    ]


def _undone(asked: Workload, names: Sequence[str]) -> Iterator[str]:
    """What a search does not look at, and says otherwise."""
    if asked.hpz > 1:
        yield "deepspeed.zero_hpz_partition_size=1"
    if asked.offload_param:
        yield "deepspeed.offload_param=none"
    yield from (f"cluster.{name}.gpus=null" for name in names if asked.roles[name].devices != 1)


def _candidates(
    work: Workload, hardware: Hardware, assume: Assumptions, budget: int
) -> Iterator[tuple[Workload, float]]:
    """Placements whose roles each fit, with their seconds as far as they are known without planning the whole."""
    if not hardware.is_gpu:
        raise ConfigError(
            f"--search places roles on GPUs, and {hardware.name} is none: roles of a CPU share its cores and memory",
            "leave --search out, or take another --hardware",
        )
    engines = _Engines(hardware, assume, budget)
    least = max(work.longest, work.text_tokens)
    budgets = sorted({max(least, tokens) for tokens in (2048, 4096, 8192, 16384)})
    # A run takes at least 2 in bfloat16 (config/deepspeed.py); a form says how others do it.
    stages = (1, 2, 3) if work.dtype == "float32" or work.gradient_dtype is None else (2, 3)
    for tokens, checkpointing, stage, frozen in itertools.product(budgets, (False, True), stages, (0, 3)):
        tried = replace(work, micro_batch_tokens=tokens, checkpointing=checkpointing)
        staged = replace(tried, roles=_staged(tried.roles, stage, frozen))
        for sets in SETS:
            if work.overlap and fitting_transport(sets) == "ipc":
                continue  # one waits for the other there
            for utilization in UTILIZATION if any("rollout" in roles for roles in sets) else UTILIZATION[:1]:
                shared = _there(sets, staged.roles)
                placed = replace(staged, shared=shared, transport=fitting_transport(shared))
                set_up = replace(placed, gpu_memory_utilization=utilization)
                yield from _combined(set_up, hardware, assume, budget, engines)


def _staged(roles: Mapping[str, Role], stage: int, frozen: int) -> dict[str, Role]:
    return {
        name: role if name == "rollout" else replace(role, zero_stage=stage if role.learns else frozen)
        for name, role in roles.items()
    }


def _there(sets: Sets, roles: Mapping[str, Role]) -> Sets:
    """Without a value model its sets are smaller."""
    left = (tuple(role for role in members if role in roles) for members in sets)
    return tuple(members for members in left if len(members) > 1)


def _combined(
    work: Workload, hardware: Hardware, assume: Assumptions, budget: int, engines: _Engines
) -> Iterator[tuple[Workload, float]]:
    options = {roles: list(_options(work, roles, hardware, assume, budget, engines)) for roles in work.device_sets()}
    if not all(options.values()):
        return
    leading = [roles for roles in options if not _only_frozen(work, roles)]
    following = [roles for roles in options if _only_frozen(work, roles)]
    for chosen in itertools.product(*(options[roles] for roles in leading)):
        rest = budget - sum(place.gpus for place in chosen)
        scored = max(place.score for place in chosen)
        places = _follow([options[roles] for roles in following], scored, rest)
        if rest < 0 or places is None:
            continue
        every = [*chosen, *places]
        seconds = sum(max(getattr(place, phase) for place in every) for phase in PHASES)
        roles = {name: role for place in every for name, role in place.roles.items()}
        yield replace(work, roles={name: roles[name] for name in work.roles}), seconds


def _only_frozen(work: Workload, roles: Sequence[str]) -> bool:
    return not any(work.roles[name].learns or name == "rollout" for name in roles)


def _follow(options: Sequence[Sequence[_Place]], scored: float, rest: float) -> list[_Place] | None:
    """For roles that only score: as few GPUs as keep up with the others, or as many as are left; None: too few."""
    chosen = []
    for number, places in enumerate(options):
        others = sum(min(place.gpus for place in later) for later in options[number + 1 :])
        possible = [place for place in places if place.gpus <= rest - others]
        if not possible:
            return None
        keeps_up = [place for place in possible if place.score <= scored]
        place = min(keeps_up, key=lambda p: p.gpus) if keeps_up else min(possible, key=lambda p: p.score)
        chosen.append(place)
        rest -= place.gpus
    return chosen


def _options(
    work: Workload,
    names: Sequence[str],
    hardware: Hardware,
    assume: Assumptions,
    budget: int,
    engines: _Engines,
) -> Iterator[_Place]:
    """This set of roles on every number of ranks on which it fits."""
    if names == ("rollout",):
        yield from engines.alone(work)
        return
    usable, clock = hardware.memory_bytes * (1 - assume["fragmentation"]), RoleClock(work, hardware, assume)
    most = work.minibatch_size if any(work.roles[name].learns for name in names) else work.batch_size
    for ranks in RANKS:
        if ranks > min(budget, most):
            break
        roles = {name: replace(work.roles[name], ranks=ranks, devices=1.0) for name in names}
        if work.dtype == "float32" and ranks == 1:
            roles = {name: replace(role, zero_stage=0) for name, role in roles.items()}
        memory = {name: rank_memory(role, work, hardware, assume) for name, role in roles.items()}
        if set_peak(memory) > usable:
            continue
        generation = engines.of(work, roles["rollout"], memory["rollout"]) if "rollout" in names else None
        if generation is not None and generation.places == 0:
            continue
        models = [role for name, role in roles.items() if name != "rollout"]
        yield _Place(
            roles,
            ranks,
            sum(clock.score(role) for role in models),
            sum(clock.update(role) for role in models if role.learns),
            generation.seconds if generation else 0.0,
            clock.moved(memory) if len(roles) > 1 else 0.0,
        )


class _Engines:
    """Generation by engines and shards: it depends on nothing else that is tried, so each is worked out once."""

    def __init__(self, hardware: Hardware, assume: Assumptions, budget: int) -> None:
        self._hardware, self._assume, self._budget = hardware, assume, budget
        self._known: dict[tuple[int, float, float], Generation] = {}
        self._alone: list[_Place] | None = None

    def alone(self, work: Workload) -> list[_Place]:
        if self._alone is None:
            self._alone = list(self._all(work))
        return self._alone

    def of(self, work: Workload, role: Role, memory: RankMemory) -> Generation:
        """With 0 places where one sequence does not fit."""
        key = (role.ranks, role.devices, work.gpu_memory_utilization)
        if key not in self._known:
            cache = memory.weights["key/value cache"] * role.devices
            made = generate_seconds(role, work, self._hardware, self._assume, cache)
            needed = work.longest * kv_bytes_per_token(role.shape, work.dtype_bytes, role.devices)
            self._known[key] = made if cache >= needed else replace(made, places=0)
        return self._known[key]

    def _all(self, work: Workload) -> Iterator[_Place]:
        for shards, engines in itertools.product(SHARDS, RANKS):
            gpus = engines * shards
            divides = not work.roles["rollout"].shape.heads % shards
            if gpus > self._budget or engines > work.batch_size or shards > self._hardware.per_node or not divides:
                continue
            role = replace(work.roles["rollout"], ranks=engines, devices=float(shards))
            memory = rank_memory(role, work, self._hardware, self._assume)
            if beyond_engine(memory, role, work, self._hardware, self._assume)[0] > 1:
                continue
            made = self.of(work, role, memory)
            if made.places:
                yield _Place({"rollout": role}, gpus, 0.0, 0.0, made.seconds)
