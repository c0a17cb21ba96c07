"""What may be changed of a config so that it fits: one key with its values, from the one that changes least."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rayrlhf.config import Config
from rayrlhf.planning.plan import Plan, too_long
from rayrlhf.planning.reading import TRAINING, longest_in_training
from rayrlhf.planning.search import SETS
from rayrlhf.planning.workload import fitting_transport

__all__ = ["Change", "changes"]

MODELS = ("policy", "value", "reference", "reward")
PARTS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Change:
    """Overrides of which each helps at least as much as the one before it."""

    steps: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(key.partition("=")[0] for step in self.steps for key in step)


def changes(config: Config, plan: Plan) -> list[Change]:
    """Those that may help the roles that do not fit."""
    roles = {role for shortfall in plan.shortfalls for role in shortfall.roles}
    found = [*_of_learners(config, roles), *_of_engines(config, roles, plan), *_of_training(config, roles, plan)]
    found += _shorter(config, plan)
    if config.model.dtype == "float32":
        found.append(_one("model.dtype=bfloat16"))
    if "policy" in roles:
        least = next((f"weights.bucket_mib={mib}" for mib in (128, 32) if mib < config.weights.bucket_mib), None)
        found += [_one(least)] if least else []
    if config.cluster.device == "cuda":  # more processes of one machine would take more of its memory
        found += [*_sharded(config, roles), *_shared(config)]
    return [*found, *_on_fewer(config, plan)]


def _one(*keys: str) -> Change:
    return Change((keys,))


def _down(key: str, now: float, least: int) -> Iterator[Change]:
    """A number's round values under `now`."""
    if values := rounds(least, now):
        yield Change(tuple((f"{key}={value}",) for value in reversed(values)))


def rounds(least: int, below: float) -> list[int]:
    """Numbers of at most two digits and zeros, from `least` (which is one in any case) to under `below`."""
    found, value = [least], least
    while True:
        unit = 10 ** max(0, len(str(value)) - 2)
        value = (value // unit + 1) * unit
        if value >= below:
            return found if least < below else []
        found.append(value)


def _sharded(config: Config, roles: set[str]) -> Iterator[Change]:
    """More ranks, with all sharded over them."""
    for times in (1, *PARTS, 16, 32):
        keys = [f"cluster.{r}.ranks={getattr(config.cluster, r).ranks * times}" for r in sorted(roles - {"rollout"})]
        if roles & {"policy", "value"} and config.ppo.zero_stage < 3:
            keys.append("ppo.zero_stage=3")
        if roles & {"reference", "reward"} and config.ppo.frozen_zero_stage < 3:
            keys.append("ppo.frozen_zero_stage=3")
        if "train" in roles:
            stages = [stage for stage in TRAINING if stage in config.stages()]
            keys += [f"{stage}.zero_stage=3" for stage in stages if getattr(config, stage).zero_stage < 3]
        if keys:
            yield _one(*keys)


def _on_fewer(config: Config, plan: Plan) -> Iterator[Change]:
    """A role on a part of its ranks. On a CPU each process takes of the machine's memory, on GPUs each a GPU."""
    counts = {f"cluster.{r}.ranks": getattr(config.cluster, r).ranks for r in MODELS if r in plan.work.roles}
    counts["rollout.engines"] = config.rollout.engines
    if config.rollout.engines > 1:
        yield from _down("rollout.engines", config.rollout.engines, 1)
        del counts["rollout.engines"]
    yield from (_one(f"{key}={count // parts}") for parts in PARTS for key, count in counts.items() if count >= parts)
    there = plan.nodes * plan.hardware.per_node
    if plan.work.train is not None and plan.work.train.ranks > there:
        yield _one(f"cluster.train.ranks={there}")


def _shared(config: Config) -> Iterator[Change]:
    """Roles in turns on the same GPUs; whoever is sharded would need equally many ranks."""
    for sets in SETS:
        if sets != config.cluster.shared:
            fitting = fitting_transport(sets)
            wrong = config.weights.transport != fitting and "shared_memory" not in (config.weights.transport, fitting)
            yield _one(f"cluster.shared={_named(sets)}", *((f"weights.transport={fitting}",) if wrong else ()))


def _named(sets: Iterable[Sequence[str]]) -> str:
    return f"[{', '.join('[' + ', '.join(roles) + ']' for roles in sets)}]"


def _of_learners(config: Config, roles: set[str]) -> Iterator[Change]:
    if roles & {"policy", "value", "train"}:
        if not config.deepspeed.activation_checkpointing:
            yield _one("deepspeed.activation_checkpointing=true")
        if config.cluster.device == "cuda" and config.deepspeed.offload_optimizer == "none":
            yield _one("deepspeed.offload_optimizer=cpu")
    if roles & {"policy", "value"}:
        yield from (_one(f"ppo.zero_stage={stage}") for stage in range(config.ppo.zero_stage + 1, 4))
    if roles & set(MODELS):
        longest = config.data.max_prompt_tokens + config.rollout.max_tokens
        yield from _down("ppo.micro_batch_tokens", config.ppo.micro_batch_tokens, longest)
    if "policy" in roles and config.ppo.ema is not None:
        yield _one("ppo.ema=null")
    if roles & {"reference", "reward"} and config.ppo.frozen_zero_stage == 0:
        yield _one("ppo.frozen_zero_stage=3")


def _shorter(config: Config, plan: Plan) -> Iterator[Change]:
    """Responses, or prompts, by as many tokens as are too many for the model."""
    for over in (int(short.over) for short in too_long(plan.work)):
        for key, now in (
            ("rollout.max_tokens", config.rollout.max_tokens),
            ("data.max_prompt_tokens", config.data.max_prompt_tokens),
        ):
            if now > over:
                yield _one(f"{key}={now - over}")


def _of_engines(config: Config, roles: set[str], plan: Plan) -> Iterator[Change]:
    rollout = config.rollout
    if "rollout" not in roles:
        return
    if config.cluster.device == "cpu":
        yield from _down("rollout.kv_cache_gib", rollout.kv_cache_gib, 1)
        yield from (_one(f"rollout.kv_cache_gib={rollout.kv_cache_gib * times}") for times in PARTS)
        return
    heads, most = plan.work.roles["rollout"].shape.heads, plan.hardware.per_node
    shards = [n for n in range(1, most + 1) if heads % n == 0 and n != rollout.tensor_parallel]
    yield from (_one(f"rollout.tensor_parallel={n}") for n in shards)
    yield from (_one(f"rollout.gpu_memory_utilization={share}") for share in (0.3, 0.5, 0.7, 0.9))


def _of_training(config: Config, roles: set[str], plan: Plan) -> Iterator[Change]:
    for stage in TRAINING if "train" in roles else ():
        if stage in config.stages():
            section = getattr(config, stage)
            least = longest_in_training(config, stage, plan.assume)
            yield from _down(f"{stage}.micro_batch_tokens", section.micro_batch_tokens, least)
            yield from (_one(f"{stage}.zero_stage={zero}") for zero in range(section.zero_stage + 1, 4))
