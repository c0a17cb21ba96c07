"""The roles of a stage that samples (collect, ppo, eval), from start to end: what each is told, and all at once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import psutil
import ray

from rayrlhf.actors.group import CLOSE_S, ActorGroup
from rayrlhf.actors.models import Judge, ModelSettings, PolicyActor, ReferenceActor, RewardActor, ValueActor
from rayrlhf.actors.placement import SAMPLING, RolePlacement, largest_first, plan_ppo
from rayrlhf.actors.pool import EnginePool
from rayrlhf.actors.roles import memory_per_role
from rayrlhf.actors.rollout import RolloutActor
from rayrlhf.actors.sharing import SharedDevices
from rayrlhf.config import Config
from rayrlhf.config.run import StageName
from rayrlhf.data.batching import Cutting
from rayrlhf.driver.recovery import Deadlines
from rayrlhf.engines.deepspeed import LearnerSettings
from rayrlhf.engines.estimation import EstimateSettings, GapLimits
from rayrlhf.engines.learning import UpdateSettings
from rayrlhf.engines.vllm import EngineSettings
from rayrlhf.errors import ActorError, ActorLost, ActorTimeout
from rayrlhf.models.build import context_length, read_config
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.replacements import Replacements
from rayrlhf.stages.sources import PPOModels
from rayrlhf.stages.training import learner_settings
from rayrlhf.types import PromptTokens
from rayrlhf.weights.probe import probe_rows
from rayrlhf.weights.publish import WeightPublisher

__all__ = ["MODEL_ROLES", "RoleSet", "first_ratio"]

# These are asked to close before they are ended.
HOLD_SHARED_MEMORY = ("policy", "rollout")
# Before the first update of a step old and new log-probs come from the same weights, and on the first step of a run
# policy and reference are the same model. float32 leaves room for the order of summation only, bfloat16 for rounding.
FIRST_RATIO = {"float32": GapLimits(1e-4, 1e-4), "bfloat16": GapLimits(math.inf, 0.02)}
# Engine and trainer compute the same function with other kernels.
MAX_LOGPROB_GAP = {"float32": 1e-3, "bfloat16": 0.05}

MODEL_ROLES = {"policy": PolicyActor, "reference": ReferenceActor, "reward": RewardActor, "value": ValueActor}


class RoleSet:
    """The actor groups of some roles. The engines hold `prompts`; every model is named in `models` by its role."""

    def __init__(
        self,
        context: StageContext,
        roles: Sequence[str],
        models: Mapping[str, str],
        prompts: Sequence[PromptTokens],
        judge: Judge | None = None,
        planned: PPOModels | None = None,
    ) -> None:
        """`planned`: PPO's, whose rewards may come from elsewhere than a reward model."""
        self._context = context
        self._config = context.config
        self._models = models
        self._prompts = prompts
        self._judge = judge
        self._source = planned.source if planned else None
        self._actors = MODEL_ROLES | dict(planned.actors if planned else {})
        self.groups: dict[str, ActorGroup] = {}
        self._planned = plan_ppo(context.config, roles, scoring_text=self._reads_text())
        self._replacements = Replacements(
            context.config.cluster.recovery, context.folder / "recoveries.jsonl", context.console
        )
        self._pool: EnginePool | None = None
        self._settings: dict[str, ModelSettings] = {}
        """what each role has been started with"""
        self._text: Any = None

    async def start(self, config: Config | None = None) -> None:
        """All roles at once: each waits mostly for its own imports. `config` may differ from the run's in settings."""
        timeout = self._config.cluster.start_timeout_s
        kept = {p.role: self._context.kept.take(p.role, self._fit(p)) for p in self._planned}
        devices = self._shared_devices()
        for placement in largest_first(self._planned):
            role, cluster = placement.role, self._config.cluster
            self.groups[role] = kept[role] or ActorGroup(
                placement, cluster.call_timeout_s, devices.get(role), cluster.recovery.look_s
            )
        self._handle = ray.put(list(self._prompts))

        async def start_model(role: str) -> None:
            group, settings = self.groups[role], self.settings(role, config or self._config)
            self._settings[role] = settings
            if kept[role]:
                with suppress(ActorLost):  # between the stages
                    await group.call("reload", settings, timeout_s=timeout)
                    return
                await group.respawn(timeout, self._arguments(role))
            else:
                await group.spawn(self._actors[role], self._arguments(role), timeout)
            await self._once_more(role, self._load(role), partial(self._anew, role))

        async def start_engines() -> None:
            group, settings = self.groups["rollout"], self._engine_settings()
            logs = [(self._context.log(f"rollout-{rank}"), settings) for rank in range(group.ranks)]

            async def become() -> None:
                await group.call("start", self._handle, timeout_s=timeout)
                await group.locate()

            async def anew() -> None:
                await group.respawn(timeout, logs)
                await become()

            if kept["rollout"]:
                with suppress(ActorLost):
                    await group.call("hold_prompts", self._handle, timeout_s=timeout)
                    return
                await group.respawn(timeout, logs)
            else:
                await group.spawn(RolloutActor, logs, timeout)
            await self._once_more("rollout", become(), anew)

        engines = [start_engines()] if "rollout" in self.groups else []
        await asyncio.gather(*engines, *(start_model(role) for role in MODEL_ROLES if role in self.groups))

    async def _once_more(self, role: str, start: Awaitable[None], anew: Callable[[], Awaitable[None]]) -> None:
        """A role that dies on its way up is begun anew, as later; one that is too slow would be so again."""
        try:
            await start
        except ActorTimeout:
            raise
        except ActorLost as lost:
            await self._replacements.replace(role, lost, anew)

    def _arguments(self, role: str) -> list[tuple[Any, ...]]:
        ranks = range(self.groups[role].ranks)
        return [(self._context.log(f"{role}-{rank}"), self._settings[role]) for rank in ranks]

    async def _load(self, role: str) -> None:
        """Let ranks that have just been created become the role."""
        group, timeout = self.groups[role], self._config.cluster.start_timeout_s
        meeting = await group.rendezvous(self._config.cluster.device, self._config.run.deterministic, timeout)
        await group.call("start", each=[(r,) for r in meeting], timeout_s=timeout)
        await group.locate()

    async def replace(self, role: str, cause: ActorError) -> None:
        """Give the role new processes in place of those that are lost, with the model that it was last given.

        Raises:
            ActorError: it has been replaced too often.
        """
        await self._replacements.replace(role, cause, partial(self._anew, role))
        if self._pool is not None and role == "policy":
            self._pool.policy_moved()

    async def _anew(self, role: str) -> None:
        group = self.groups[role]
        await group.respawn(self._config.cluster.start_timeout_s, self._arguments(role))
        await self._load(role)
        if role == "policy" and self._text is not None:
            await group.call("hold_text", self._text)

    async def settled(self) -> None:
        """Wait for roles that are being replaced; raises as `replace` does."""
        await self._replacements.settled()

    async def again(self, what: str, cause: ActorError) -> None:
        """Wait before what was lost is made again: it may be only so often, as with roles.

        Raises:
            ActorError: too often.
        """

        async def nothing_to_start() -> None:
            pass

        await self._replacements.replace(what, cause, nothing_to_start)

    async def _replace_engine(self, rank: int, cause: ActorError) -> None:
        timeout, group = self._config.cluster.start_timeout_s, self.groups["rollout"]

        async def start() -> None:
            await group.respawn(timeout, rank=rank)
            await group.call_rank(rank, "start", self._handle, timeout_s=timeout)
            await group.locate(rank)

        await self._replacements.replace(f"rollout-{rank}", cause, start)

    def watch(self) -> None:
        """From here on a call that takes much longer than its like has hung: batches are of one size now."""
        for role, group in self.groups.items():
            group.deadlines = deadlines_of(self._config, role, group.ranks)

    def _shared_devices(self) -> dict[str, SharedDevices]:
        """By role: those of `cluster.shared` that this stage uses two or more roles of."""
        devices: dict[str, SharedDevices] = {}
        for roles in self._config.cluster.shared:
            placements = [placement for placement in self._planned if placement.role in roles]
            if len(placements) > 1:
                devices |= dict.fromkeys((p.role for p in placements), SharedDevices(placements))
        return devices

    def _reads_text(self) -> bool:
        return self._source is not None and self._source.config.sees_text

    def pool(self) -> EnginePool:
        """The engines, published to from the policy."""
        if self._pool is not None:
            return self._pool
        config = self._config
        rows = probe_rows(len(self._context.data.tokenizer), config.weights.probe_tokens, self._context_tokens())
        publisher = WeightPublisher(rows, config.model.dtype, config.weights.probe_tolerance)
        engines, policy, fixed = self.groups["rollout"], self.groups["policy"], config.run.deterministic
        transport, workers = config.weights.transport, config.rollout.tensor_parallel
        self._pool = EnginePool(
            engines, policy, publisher, self._prompts, fixed, transport, workers, self._replace_engine
        )
        return self._pool

    async def hold_text(self, blocks: np.ndarray) -> None:
        self._text = ray.put(blocks)
        await self.groups["policy"].call("hold_text", self._text)

    async def reload(self, role: str, config: Config, model: str | None = None) -> None:
        """Let the role's ranks begin again as `config` has it, with their own model or another."""
        self._settings[role] = self.settings(role, config, model)
        await self.groups[role].call("reload", self._settings[role], timeout_s=config.cluster.start_timeout_s)

    async def memory(self, without: str = "") -> dict[str, float]:
        """GiB of the largest rank, by role, and the driver's; a role that is busy would be waited for."""
        memory = await memory_per_role([group for role, group in self.groups.items() if role != without])
        return memory | {"memory/driver_gib": psutil.Process().memory_info().rss / 2**30}

    def keep_for(self, stage: StageName) -> None:
        """Leave what `stage` can use of the actors, if the run goes through it and they are in nobody's way till then.

        Not on a cluster or a GPU: what they hold there is what the stages between need.
        """
        cluster = self._config.cluster
        local = cluster.address is None and cluster.device == "cpu" and not cluster.shared
        if stage in self._config.stages() and local:
            for placement in self._planned:
                whole = placement.role != "rollout" or self._pool is None or self._pool.whole
                if placement.role in (SAMPLING[stage] or self.groups) and whole:
                    self.groups[placement.role].deadlines = None
                    self._context.kept.put(placement.role, self._fit(placement), self.groups.pop(placement.role))

    def _fit(self, placement: RolePlacement) -> Any:
        """What actors of this role must have in common to be used again."""
        own = self._engine_settings() if placement.role == "rollout" else self._actors[placement.role]
        return (placement, own)

    async def stop(self) -> None:
        """End every actor that is not kept; what it holds outside its own memory is given back first."""

        if self._pool is not None:
            await self._pool.close()
        await self._replacements.close()

        async def give_back(role: str) -> None:
            group = self.groups.get(role)
            if group and group.actors:
                with suppress(ActorError, TimeoutError):  # one that is busy or gone is ended all the same
                    async with asyncio.timeout(CLOSE_S):  # whatever it was asked before
                        await group.call("close")

        await asyncio.gather(*(give_back(role) for role in HOLD_SHARED_MEMORY))
        for group in self.groups.values() if not self._context.head_lost else ():
            with suppress(Exception):  # Ray may be gone already; the next group must still be tried
                group.close()

    def settings(self, role: str, config: Config, model: str | None = None) -> ModelSettings:
        ppo, frozen = config.ppo, role in ("reference", "reward")
        cutting = Cutting(ppo.micro_batch_tokens, config.model.packed)
        return ModelSettings(
            path=model or self._models[role],
            dtype=config.model.dtype,
            device=config.cluster.device,
            trust_remote_code=config.model.trust_remote_code,
            cutting=cutting,
            zero_stage=ppo.frozen_zero_stage if frozen else ppo.zero_stage,
            temperature=config.rollout.temperature,
            learner=None if frozen else _learner(self._context, config, role),
            estimate=_estimate(config),
            update=_update(config, ppo.clip if role == "policy" else ppo.value_clip, cutting),
            transport=config.weights.transport,
            bucket_bytes=int(config.weights.bucket_mib * 2**20),
            run=config.run.name,
            samples=config.tracking.samples_per_step,
            judge=self._judge if role == "policy" else None,
            source=self._source if role == "reward" else None,
        )

    def _context_tokens(self) -> int:
        """Longest sequence of a step; what the engine's key/value cache is sized for."""
        asked = self._config.data.max_prompt_tokens + self._config.rollout.max_tokens
        model = context_length(read_config(self._models["policy"], self._config.model.trust_remote_code))
        return min(asked, model) if model else asked

    def _engine_settings(self) -> EngineSettings:
        config = self._config
        return EngineSettings(
            model=self._models["policy"],
            dtype=config.model.dtype,
            device=config.cluster.device,
            context=self._context_tokens(),
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            tensor_parallel=config.rollout.tensor_parallel,
            threads=config.cluster.rollout.threads,
            kv_cache_gib=config.rollout.kv_cache_gib,
            gpu_memory_utilization=config.rollout.gpu_memory_utilization,
            max_sequences=config.rollout.max_sequences,
            transport=config.weights.transport,
            run=config.run.name,
            eos=self._context.data.tokenizer.eos_token_id,
            trust_remote_code=config.model.trust_remote_code,
            deterministic=config.run.deterministic,
            sleeps=bool(config.cluster.sharing("rollout")),
        )


def deadlines_of(config: Config, role: str, ranks: int) -> Deadlines:
    """A source that reads text has limits of its own, and has not hung within them."""
    ppo, recovery, most = config.ppo, config.cluster.recovery, config.cluster.call_timeout_s
    floor = min(recovery.hang_floor_s, most)
    if role == "reward" and ppo.reward.sees_text:
        floor = max(floor, ppo.reward.longest_s(math.ceil(ppo.batch_size / ranks)))
    return Deadlines(floor, recovery.hang_factor, max(most, floor))


def first_ratio(config: Config) -> GapLimits:
    """How far old and new log-probs may be apart before a step's first update."""
    return FIRST_RATIO[config.model.dtype] if config.ppo.old_logprobs == "recompute" else _gap(config)


def _gap(config: Config) -> GapLimits:
    limit = config.rollout.max_logprob_gap or MAX_LOGPROB_GAP[config.model.dtype]
    return GapLimits(largest=limit) if config.model.dtype == "float32" else GapLimits(mean=limit)


def _estimate(config: Config) -> EstimateSettings:
    ppo = config.ppo
    return EstimateSettings(
        kl_kind=ppo.kl.kind,
        gamma=ppo.gamma,
        lam=ppo.lam,
        advantage=ppo.advantage,
        group_size=ppo.samples_per_prompt,
        normalize=ppo.score.normalize == "batch",
        score_clip=ppo.score.clip,
        truncated=ppo.truncated.treatment,
        truncated_value=ppo.truncated.value or 0.0,
        old_from_rollout=ppo.old_logprobs == "rollout",
        importance_cap=ppo.importance_cap,
        gap=_gap(config),
    )


def _update(config: Config, clip: float, cutting: Cutting) -> UpdateSettings:
    ppo = config.ppo
    return UpdateSettings(
        clip=clip,
        cutting=cutting,
        temperature=config.rollout.temperature,
        dual_clip=ppo.dual_clip,
        kl_stop=ppo.kl.stop,
        ratio_cap=ppo.importance_cap if ppo.old_logprobs == "rollout" else None,
        first_ratio=first_ratio(config),
        ptx_coef=ppo.ptx.coef,
    )


def _learner(context: StageContext, config: Config, role: str) -> LearnerSettings:
    ppo = config.ppo
    if role == "policy":
        return learner_settings(context, role, ppo.adam, ppo.zero_stage, ppo.learning_rate, ppo.ema)
    return learner_settings(context, role, ppo.adam, ppo.zero_stage, ppo.value_learning_rate)
