"""`ppo`: config -> actors -> loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import ray

from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.models import ModelSettings, PolicyActor, ReferenceActor, RewardActor, ValueActor
from rayrlhf.actors.placement import plan_ppo
from rayrlhf.actors.roles import LearnerRoles, ScorerRoles, StepPlan, TextPlan, memory_per_role
from rayrlhf.actors.rollout import EnginePool, RolloutActor
from rayrlhf.algorithms.kl import AdaptiveKL, FixedKL
from rayrlhf.data.batching import Cutting
from rayrlhf.driver.loop import Parts, run_ppo
from rayrlhf.driver.pacing import PromptStream, SyncPacing, TextStream
from rayrlhf.engines.deepspeed import LearnerSettings
from rayrlhf.engines.estimation import EstimateSettings, GapLimits
from rayrlhf.engines.learning import UpdateSettings
from rayrlhf.engines.schedule import linear_warmup
from rayrlhf.engines.vllm import EngineSettings
from rayrlhf.errors import ActorError
from rayrlhf.metrics.clock import StepClock
from rayrlhf.metrics.sinks import JsonLines, read_jsonl
from rayrlhf.models.build import context_length, read_config
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.progress import StageProgress
from rayrlhf.stages.saving import PolicySaver
from rayrlhf.stages.training import learner_settings
from rayrlhf.stages.verification import VerifiedLearners
from rayrlhf.weights.probe import probe_sequences
from rayrlhf.weights.publish import WeightPublisher

__all__ = ["run_ppo_stage"]

# These are asked to close before they are ended, and get this long.
HOLD_SHARED_MEMORY = ("policy", "rollout")
CLOSE_S = 3.0
# Before the first update of a step old and new log-probs come from the same weights, and on the first step of a run
# policy and reference are the same model. float32 leaves room for the order of summation only, bfloat16 for rounding.
FIRST_RATIO = {"float32": GapLimits(1e-4, 1e-4), "bfloat16": GapLimits(math.inf, 0.02)}
# Engine and trainer compute the same function with other kernels.
MAX_LOGPROB_GAP = {"float32": 1e-3, "bfloat16": 0.05}


ACTORS = {"policy": PolicyActor, "reference": ReferenceActor, "reward": RewardActor, "value": ValueActor}


def run_ppo_stage(context: StageContext, parents: dict[str, str], workspace: Path) -> dict[str, Any]:
    """PPO of the SFT model against the reward model; leaves model/ and value/ in the workspace."""
    context.ensure_ray()
    return asyncio.run(_Run(context, parents, workspace).run())


class _Run:
    """One PPO run: its actor groups from start to end."""

    def __init__(self, context: StageContext, parents: dict[str, str], workspace: Path) -> None:
        self.context = context
        self.config = context.config
        self.parents = parents
        self.workspace = workspace
        self.groups: dict[str, ActorGroup] = {}
        limit = self.config.rollout.max_logprob_gap or MAX_LOGPROB_GAP[self.config.model.dtype]
        is_float32 = self.config.model.dtype == "float32"
        self.gap = GapLimits(largest=limit) if is_float32 else GapLimits(mean=limit)
        recomputes = self.config.ppo.old_logprobs == "recompute"
        self.first_ratio = FIRST_RATIO[self.config.model.dtype] if recomputes else self.gap

    async def run(self) -> dict[str, Any]:
        start = perf_counter()
        with StageProgress(self.context.console, "ppo") as progress:
            try:
                progress.phase("starting")
                await self._start_actors()
                ready = perf_counter()
                await self._loop(progress)
                progress.phase("saving")
                await self._save_final()
            finally:
                await self._stop_actors()
        _, counts = self.context.data.prompts
        history = read_jsonl(self.workspace / "metrics.jsonl")  # from disk: the driver keeps nothing per step
        return _summary(history) | {"data": counts, "start_seconds": ready - start}

    async def _start_actors(self) -> None:
        """All roles at once: each waits mostly for its own imports."""
        config, timeout = self.config, self.config.cluster.start_timeout_s
        for placement in plan_ppo(config):
            self.groups[placement.role] = ActorGroup(placement, config.cluster.call_timeout_s)
        prompts, _ = self.context.data.prompts
        prompts_handle = ray.put(prompts)

        async def start_model(role: str) -> None:
            group, settings = self.groups[role], self._model_settings(role)
            logs = [(self.context.log(f"{role}-{rank}"), settings) for rank in range(group.ranks)]
            await group.spawn(ACTORS[role], logs, timeout)
            meeting = await group.rendezvous(config.cluster.device, config.run.deterministic, timeout)
            await group.call("start", each=[(r,) for r in meeting], timeout_s=timeout)
            if role == "policy" and self.context.data.uses_text:
                await group.call("hold_text", ray.put(self._text_blocks()))

        async def start_engines() -> None:
            group, settings = self.groups["rollout"], self._engine_settings()
            logs = [(self.context.log(f"rollout-{rank}"), settings) for rank in range(group.ranks)]
            await group.spawn(RolloutActor, logs, timeout)
            await group.call("start", prompts_handle, timeout_s=timeout)

        await asyncio.gather(start_engines(), *(start_model(role) for role in ACTORS if role in self.groups))

    async def _loop(self, progress: StageProgress) -> None:
        config, ppo = self.config, self.config.ppo
        clock = StepClock(self.workspace / "trace.json", progress.phase)
        prompts, _ = self.context.data.prompts
        stream = PromptStream([p.prompt_id for p in prompts], config.run.seed, ppo.samples_per_prompt)
        publisher = WeightPublisher(self._probe_rows(), config.model.dtype, config.weights.probe_tolerance)
        pool = EnginePool(self.groups["rollout"], self.groups["policy"], publisher)
        learners = LearnerRoles(self.groups["policy"], self.groups.get("value"), self._step_plan())
        sink = _StageSink(self.context, progress, ppo.steps, self.workspace)
        parts = Parts(
            rollout=pool,
            scorers=ScorerRoles([self.groups[role] for role in self._scoring_roles()]),
            learners=self._verified(learners, progress) if self.context.verify_step else learners,
            weights=pool,
            checkpoints=PolicySaver(self.groups, self.context, config.checkpoint),
            sink=sink,
            clock=clock,
            gauges=self._gauges,
        )
        kl = AdaptiveKL(ppo.kl.coef, ppo.kl.target, ppo.kl.horizon) if ppo.kl.target else FixedKL(ppo.kl.coef)
        try:
            await run_ppo(parts, SyncPacing(stream, ppo.batch_size, ppo.steps, clock), kl)
        finally:
            clock.close()
            sink.close()

    def _verified(self, learners: LearnerRoles, progress: StageProgress) -> VerifiedLearners:
        blocks = self._text_blocks() if self.context.data.uses_text else None
        return VerifiedLearners(self.context, self.parents, self.groups, learners, blocks, progress.phase)

    def _scoring_roles(self) -> list[str]:
        """All models there are, but the policy where the engine's log-probs stand for its own."""
        without = "policy" if self.config.ppo.old_logprobs == "rollout" else ""
        return [role for role in ACTORS if role in self.groups and role != without]

    def _step_plan(self) -> StepPlan:
        config, ppo = self.config, self.config.ppo
        text = None
        if self.context.data.uses_text:
            stream = TextStream(len(self.context.data.pretrain.train), config.run.seed)
            text = TextPlan(stream, ppo.ptx.examples_per_episode, ppo.ptx.norms_every)

        def rates(step: int) -> tuple[float, float]:
            value = linear_warmup(step, ppo.value_learning_rate, ppo.warmup_steps)
            return linear_warmup(step - ppo.value_warmup_steps, ppo.learning_rate, ppo.warmup_steps), value

        return StepPlan(
            minibatch_size=ppo.minibatch_size,
            epochs=ppo.epochs,
            seed=config.run.seed,
            samples_per_prompt=ppo.samples_per_prompt,
            value_warmup_steps=ppo.value_warmup_steps,
            first_kl_limit=min(self.first_ratio.largest, self.first_ratio.mean),
            learning_rates=rates,
            text=text,
        )

    def _text_blocks(self) -> np.ndarray:
        return np.stack([example.tokens for example in self.context.data.pretrain.train])

    async def _gauges(self) -> dict[str, float]:
        memory = await memory_per_role(list(self.groups.values()))
        return memory | {"memory/driver_gib": psutil.Process().memory_info().rss / 2**30}

    async def _save_final(self) -> None:
        saver = PolicySaver(self.groups, self.context, self.config.checkpoint)
        await saver.save_to(self.workspace)

    async def _stop_actors(self) -> None:
        async def give_back(role: str) -> None:
            group = self.groups.get(role)
            if group and group.actors:
                with suppress(ActorError):  # one that is busy or gone is ended all the same
                    await group.call("close", timeout_s=CLOSE_S)

        await asyncio.gather(*(give_back(role) for role in HOLD_SHARED_MEMORY))
        for group in self.groups.values():
            with suppress(Exception):  # Ray may be gone already; the next group must still be tried
                group.close()

    def _probe_rows(self) -> list[list[int]]:
        vocabulary = len(self.context.data.tokenizer)
        return probe_sequences(vocabulary, self.config.weights.probe_tokens, self._context_tokens())

    def _context_tokens(self) -> int:
        """Longest sequence of a step; what the engine's key/value cache is sized for."""
        asked = self.config.data.max_prompt_tokens + self.config.rollout.max_tokens
        model = context_length(read_config(self.parents["sft"], self.config.model.trust_remote_code))
        return min(asked, model) if model else asked

    def _engine_settings(self) -> EngineSettings:
        config = self.config
        return EngineSettings(
            model=self.parents["sft"],
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
            eos=self.context.data.tokenizer.eos_token_id,
            trust_remote_code=config.model.trust_remote_code,
            deterministic=config.run.deterministic,
        )

    def _model_settings(self, role: str) -> ModelSettings:
        config, ppo = self.config, self.config.ppo
        frozen = role in ("reference", "reward")
        cutting = Cutting(ppo.micro_batch_tokens, config.model.packed)
        return ModelSettings(
            # The value model starts from the reward model, its head included (Ouyang et al. 2022, appendix C.4).
            path=self.parents["sft" if role in ("policy", "reference") else "reward"],
            dtype=config.model.dtype,
            device=config.cluster.device,
            trust_remote_code=config.model.trust_remote_code,
            cutting=cutting,
            zero_stage=ppo.frozen_zero_stage if frozen else ppo.zero_stage,
            temperature=config.rollout.temperature,
            learner=None if frozen else self._learner(role),
            estimate=self._estimate_settings(),
            update=self._update_settings(ppo.clip if role == "policy" else ppo.value_clip, cutting),
            transport=config.weights.transport,
            bucket_bytes=int(config.weights.bucket_mib * 2**20),
            run=config.run.name,
            samples=config.tracking.samples_per_step,
        )

    def _estimate_settings(self) -> EstimateSettings:
        ppo = self.config.ppo
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
            gap=self.gap,
        )

    def _update_settings(self, clip: float, cutting: Cutting) -> UpdateSettings:
        ppo = self.config.ppo
        return UpdateSettings(
            clip=clip,
            cutting=cutting,
            temperature=self.config.rollout.temperature,
            dual_clip=ppo.dual_clip,
            kl_stop=ppo.kl.stop,
            old_from_rollout=ppo.old_logprobs == "rollout",
            importance_cap=ppo.importance_cap,
            first_ratio=self.first_ratio,
            ptx_coef=ppo.ptx.coef,
        )

    def _learner(self, role: str) -> LearnerSettings:
        ppo = self.config.ppo
        if role == "policy":
            return learner_settings(self.context, role, ppo.adam, ppo.zero_stage, ppo.learning_rate, ppo.ema)
        return learner_settings(self.context, role, ppo.adam, ppo.zero_stage, ppo.value_learning_rate)


class _StageSink:
    """The loop's records: to the run's sinks, the artifact, and the progress bar."""

    def __init__(self, context: StageContext, progress: StageProgress, steps: int, workspace: Path) -> None:
        self._context = context
        # The artifact's own copies: a later run that finds the stage done shows the same records.
        self._kept = (JsonLines(workspace / "metrics.jsonl"), JsonLines(workspace / "samples.jsonl"))
        self._progress = progress
        self._steps = steps

    def write(self, record: Mapping[str, Any]) -> None:
        self._context.sink.write({"stage": "ppo", **record})
        self._kept[0].write(record)
        for engine, reason in record["weights/quarantine_reasons"].items():
            self._context.console.print(f"[yellow]{engine} is left out, its weights are not verified:[/] {reason}")
        shown = {"reward": record["reward/mean"], "kl": record["kl/mean"], "length": record["response/length_mean"]}
        self._progress.step(record["step"], self._steps, shown)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        for sample in samples:
            self._context.sink.write_sample({"step": step, **sample})
            self._kept[1].write({"step": step, **sample})

    def close(self) -> None:
        for file in self._kept:
            file.close()


def _summary(history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over the first and the last tenth of the steps, seconds per phase, memory per role."""
    tenth = max(1, len(history) // 10)

    def mean(key: str, rows: Sequence[Mapping[str, float]]) -> float:
        return sum(row[key] for row in rows) / len(rows)

    names = ("reward/mean", "kl/mean", "response/length_mean")
    return {
        "steps": len(history),
        "first": {n: mean(n, history[:tenth]) for n in names},
        "last": {n: mean(n, history[-tenth:]) for n in names},
        "seconds_per_step": {k: mean(k, history) for k in history[0] if k.startswith("time/")},
        "memory_gib": {k: max(row[k] for row in history) for k in history[0] if k.startswith("memory/")},
    }
