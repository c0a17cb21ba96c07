"""What would make a config fit: keys to change, the cheapest first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rayrlhf.config import Config, config_from
from rayrlhf.errors import ConfigError, ResourceError
from rayrlhf.planning.plan import Plan
from rayrlhf.planning.search import SETS

__all__ = ["TRAINING", "Remedy", "check_fits", "remedies"]

SHOWN = 3
TRAINING = ("pretrain", "sft", "reward", "dpo")


@dataclass(frozen=True, slots=True)
class Remedy:
    overrides: tuple[str, ...]
    plan: Plan


def check_fits(config: Config, plan: Plan, planned: Callable[[Config], Plan]) -> None:
    """Raise ResourceError where `plan`, of `config`, does not fit; it names roles, GiB over, and what would help.

    Args:
        planned: plans another config on the same hardware.
    """
    if plan.fits:
        return
    message = "; ".join(shortfall.message for shortfall in plan.shortfalls)
    found = remedies(config, plan, planned)
    hint = "\n    ".join(_words(remedy, plan) for remedy in found)
    raise ResourceError(
        f"this does not fit: {message}",
        f"any of these would do:\n    {hint}" if found else "take a smaller model, or more of the hardware",
    )


def remedies(config: Config, plan: Plan, planned: Callable[[Config], Plan]) -> list[Remedy]:
    """Up to three changes with which it fits: single keys before pairs, and those that cost least time first."""
    changes = list(_changes(config, plan))
    found: dict[tuple[str, ...], Remedy] = {}
    for size in (1, 2):
        for parts in itertools.combinations(changes, size):
            keys = tuple(itertools.chain(*parts))
            names = _names(keys)
            if len(names) < len(keys) or any(set(known.overrides) < set(keys) for known in found.values()):
                continue
            other = _planned_with(config, keys, planned)
            if other and other.fits and (names not in found or _cost(other) < _cost(found[names].plan)):
                found[names] = Remedy(keys, other)
        if len(found) >= SHOWN:
            break
    return sorted(found.values(), key=lambda remedy: _cost(remedy.plan))[:SHOWN]


def _planned_with(config: Config, keys: tuple[str, ...], planned: Callable[[Config], Plan]) -> Plan | None:
    try:
        return planned(config_from(config.model_dump(mode="json"), keys, {}))
    except ConfigError:  # keys that contradict each other, or others
        return None


def _cost(plan: Plan) -> float:
    return plan.time.seconds * (plan.devices if plan.work.gpu else 1.0)


def _words(remedy: Remedy, before: Plan) -> str:
    more = _cost(remedy.plan) / _cost(before) - 1
    what = "GPU-seconds" if before.work.gpu else "seconds"
    return f"{' '.join(remedy.overrides)} ({more:+.0%} {what} a step)"


def _names(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({key.partition("=")[0] for key in keys}))


def _changes(config: Config, plan: Plan) -> Iterator[tuple[str, ...]]:
    """Changes that may help the roles that do not fit: a key, or keys that belong together."""
    roles = {role for shortfall in plan.shortfalls for role in shortfall.roles}
    single = itertools.chain(_of_learners(config, roles), _of_engines(config, roles), _of_training(config, roles))
    yield from ((key,) for key in single)
    if config.model.dtype == "float32":
        yield ("model.dtype=bfloat16",)
    if config.cluster.device == "cuda":  # more processes of one machine would take more of its memory
        yield from _sharded(config, roles)
        yield from ((key,) for key in _on_fewer(config, plan))


def _on_fewer(config: Config, plan: Plan) -> Iterator[str]:
    """Where there are too few GPUs: a role on a part of its ranks, or several in turns on the same ones."""
    there = plan.nodes * plan.hardware.per_node
    counts = {
        f"cluster.{role}.ranks": getattr(config.cluster, role).ranks for role in plan.work.roles if role != "rollout"
    }
    counts["rollout.engines"] = config.rollout.engines
    if plan.devices > there:
        yield from (f"{key}={count // parts}" for parts in (2, 4, 8) for key, count in counts.items() if count >= parts)
        yield from (_shared(sets) for sets in SETS if sets)
    if plan.work.train is not None and plan.work.train.ranks > there:
        yield f"cluster.train.ranks={there}"


def _shared(sets: Iterable[Sequence[str]]) -> str:
    named = ", ".join(f"[{', '.join(roles)}]" for roles in sets)
    return f"cluster.shared=[{named}]"


def _sharded(config: Config, roles: set[str]) -> Iterator[tuple[str, ...]]:
    """Weights and all over so many times the ranks, of every role that does not fit."""
    for times in (2, 4, 8, 16, 32):
        keys = [f"cluster.{r}.ranks={getattr(config.cluster, r).ranks * times}" for r in sorted(roles - {"rollout"})]
        if roles & {"policy", "value"} and config.ppo.zero_stage < 3:
            keys.append("ppo.zero_stage=3")
        if roles & {"reference", "reward"} and config.ppo.frozen_zero_stage < 3:
            keys.append("ppo.frozen_zero_stage=3")
        if "train" in roles:
            stages = [stage for stage in TRAINING if stage in config.stages()]
            keys += [f"{stage}.zero_stage=3" for stage in stages if getattr(config, stage).zero_stage < 3]
        if keys:
            yield tuple(keys)


def _of_learners(config: Config, roles: set[str]) -> Iterator[str]:
    if roles & {"policy", "value", "train"}:
        if not config.deepspeed.activation_checkpointing:
            yield "deepspeed.activation_checkpointing=true"
        if config.cluster.device == "cuda" and config.deepspeed.offload_optimizer == "none":
            yield "deepspeed.offload_optimizer=cpu"
    if roles & {"policy", "value"}:
        for stage in range(config.ppo.zero_stage + 1, 4):
            yield f"ppo.zero_stage={stage}"
    if roles & {"policy", "value", "reference", "reward"}:
        longest = config.data.max_prompt_tokens + config.rollout.max_tokens
        for parts in (2, 4, 8):
            if (tokens := config.ppo.micro_batch_tokens // parts) >= longest:
                yield f"ppo.micro_batch_tokens={tokens}"
    if "policy" in roles and config.ppo.ema is not None:
        yield "ppo.ema=null"
    if roles & {"reference", "reward"} and config.ppo.frozen_zero_stage == 0:
        yield "ppo.frozen_zero_stage=3"


def _of_engines(config: Config, roles: set[str]) -> Iterator[str]:
    rollout = config.rollout
    if "rollout" not in roles:
        return
    if config.cluster.device == "cpu":
        if rollout.kv_cache_gib > 1:
            yield f"rollout.kv_cache_gib={rollout.kv_cache_gib // 2}"
        yield from (f"rollout.kv_cache_gib={rollout.kv_cache_gib * times}" for times in (2, 4, 8))
        return
    for times in (2, 4, 8):
        yield f"rollout.tensor_parallel={rollout.tensor_parallel * times}"
    for share in (0.3, 0.5, 0.7, 0.9):
        yield f"rollout.gpu_memory_utilization={share}"


def _of_training(config: Config, roles: set[str]) -> Iterator[str]:
    for stage in TRAINING if "train" in roles else ():
        if stage in config.stages():
            section = getattr(config, stage)
            yield f"{stage}.micro_batch_tokens={section.micro_batch_tokens // 2}"
            yield from (f"{stage}.zero_stage={zero}" for zero in range(section.zero_stage + 1, 4))
