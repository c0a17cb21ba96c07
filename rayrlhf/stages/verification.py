"""`--verify-step N`: one step of a run beside the reference trainer's.

estimate ──► handles kept                     record ──► update ──► record
                                                │ weights, Adam's state   │ weights
                                                └── first gradient ───────┴──► reference trainer ──► table
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import ray

from rayrlhf.actors.roles import LearnerRoles
from rayrlhf.actors.verification import Snapshot, verify
from rayrlhf.config import Config
from rayrlhf.driver.protocols import ExperienceBatch, ScoredBatch
from rayrlhf.errors import ActorLost, TrainingError
from rayrlhf.evaluation.agreement import Recipe, Row
from rayrlhf.metrics.sinks import to_json
from rayrlhf.models.build import NORMALISATION_KEY, read_config
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.roles import RoleSet
from rayrlhf.stages.summary import show_agreement
from rayrlhf.types import StepReport

__all__ = ["VerifiedLearners"]

LEARNERS = ("policy", "value")
# In logs/ and in what is told of losses.
WHO = "reference-trainer"


class VerifiedLearners:
    """`LearnerRoles`, and around one of its updates the comparison; the loop does not notice."""

    def __init__(
        self,
        context: StageContext,
        parents: Mapping[str, str],
        roles: RoleSet,
        learners: LearnerRoles,
        blocks: np.ndarray | None,
        phase: Callable[[str], None],
    ) -> None:
        """blocks: int32 [blocks, L], the pretraining text of PPO-ptx; phase: tells the user what goes on."""
        assert context.verify_step is not None
        self._context = context
        self._parents = parents
        self._roles = roles
        self._learners = learners
        self._text = None if blocks is None else ray.put(blocks)
        self._phase = phase
        self._step = context.verify_step
        self._folder = context.folder / f"verify-step-{self._step}"
        self._scored: tuple[ScoredBatch, float] | None = None

    async def estimate(self, batch: ScoredBatch, kl_coef: float) -> ExperienceBatch:
        self._scored = batch, kl_coef
        return await self._learners.estimate(batch, kl_coef)

    async def update(self, experience: ExperienceBatch, step: int) -> StepReport:
        """Raises TrainingError when it is the step to compare, and the reference trainer comes to something else."""
        scored, self._scored = self._scored, None
        if step + 1 != self._step:
            return await self._learners.update(experience, step)
        assert scored is not None
        start = perf_counter()
        shutil.rmtree(self._folder, ignore_errors=True)  # of an attempt in which a learner was lost
        self._folder.mkdir(parents=True)
        adam_steps = await self._record("record_before")
        updating = perf_counter()
        report = await self._learners.update(experience, step)
        updated = perf_counter()
        self._phase("verifying")
        await self._record("record_after")
        rows = await self._compare(scored, experience, adam_steps, report)
        self._report(rows, perf_counter() - start - (updated - updating))
        return report

    async def _record(self, method: str) -> dict[str, Any]:
        """Both learners at once, into a folder each; what rank 0 of each returns."""
        calls = [self._roles.groups[role].call(method, str(self._folder / role)) for role in LEARNERS]
        return {role: ranks[0] for role, ranks in zip(LEARNERS, await asyncio.gather(*calls), strict=True)}

    async def _compare(
        self,
        scored: tuple[ScoredBatch, float],
        experience: ExperienceBatch,
        adam_steps: Mapping[str, int],
        report: StepReport,
    ) -> list[Row]:
        config, sft, reward = self._context.config, self._parents["sft"], self._parents["reward"]
        batch, kl_coef = scored
        assert self._learners.last is not None
        snapshot = Snapshot(
            folder=str(self._folder),
            update=self._learners.last,
            adam_steps=adam_steps,
            metrics=report.metrics,
            models={"policy": sft, "reference": sft, "reward": reward, "value": reward},
            trust_remote_code=config.model.trust_remote_code,
            recipe=_recipe(config, kl_coef, reward),
        )
        policy, limit = config.cluster.policy, config.cluster.call_timeout_s
        log, threads = self._context.log(WHO), policy.threads * policy.ranks
        while True:
            try:
                return await verify(snapshot, batch, experience, self._text, log, threads, limit)
            except ActorLost as lost:
                await self._roles.again(WHO, lost)

    def _report(self, rows: Sequence[Row], seconds: float) -> None:
        dtype = self._context.config.model.dtype
        title = f"step {self._step} in {dtype} against the reference trainer ({seconds:.1f} s)"
        show_agreement(self._context.console, title, rows)
        found = [row for row in rows if row.differs is not None]
        record = {"step": self._step, "dtype": dtype, "agrees": not found, "seconds": seconds}
        path = self._folder.with_name(f"{self._folder.name}.json")
        path.write_text(to_json({**record, "rows": [row.to_dict() for row in rows]}) + "\n", encoding="utf-8")
        if found:
            first = found[0]
            raise TrainingError(
                f"step {self._step} is not the reference trainer's in {first.quantity}, first in {first.differs}: "
                f"off by up to {first.gap:.3g} (allowed {first.tolerance:g})",
                f"{path} has every quantity, {self._folder} the weights, Adam's state and gradients of the step",
            )
        shutil.rmtree(self._folder)


def _recipe(config: Config, kl_coef: float, reward: str) -> Recipe:
    ppo = config.ppo
    bias, scale = getattr(read_config(reward, config.model.trust_remote_code), NORMALISATION_KEY, (0.0, 1.0))
    return Recipe(
        dtype=config.model.dtype,
        temperature=config.rollout.temperature,
        kl_coef=kl_coef,
        kl_kind=ppo.kl.kind,
        gamma=ppo.gamma,
        lam=ppo.lam,
        clip=ppo.clip,
        value_clip=ppo.value_clip,
        ptx_coef=ppo.ptx.coef,
        normalisation=(bias, scale),
        betas=ppo.adam.betas,
        eps=ppo.adam.eps,
        weight_decay=ppo.adam.weight_decay,
        grad_clip=ppo.adam.grad_clip,
    )
