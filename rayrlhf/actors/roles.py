"""The driver's view of the model roles: who scores, who learns, how the work is dealt to ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrlhf.actors.group import ActorGroup
from rayrlhf.data.batching import balance
from rayrlhf.driver.pacing import TextStream
from rayrlhf.driver.protocols import ExperienceBatch, Handle, RolloutBatch, ScoredBatch, ScoredPart
from rayrlhf.driver.together import together
from rayrlhf.errors import ActorError, ActorLost, TrainingError
from rayrlhf.types import RolloutInfo, StepReport

__all__ = ["LearnerRoles", "ScorerRoles", "StepPlan", "TextPlan", "UpdateRecord", "memory_per_role", "score_with"]

Replace = Callable[[str, ActorError], Awaitable[None]]
"""Starts a role anew with its model; raises when it may not be any more."""


class ScorerRoles:
    """Reference log-probs and rewards of the frozen roles; old log-probs and values of those that learn."""

    def __init__(
        self, frozen: Sequence[ActorGroup], learning: Sequence[ActorGroup], replace: Replace | None = None
    ) -> None:
        """Without `replace` a frozen role that is lost ends the batch."""
        self._frozen = frozen
        self._learning = learning
        self._replace = replace

    async def frozen(self, batch: RolloutBatch) -> ScoredPart:
        return await score_with(self._frozen, batch, self._replace)

    async def learning(self, batch: RolloutBatch) -> tuple[Handle, ...]:
        return (await score_with(self._learning, batch)).handles


async def score_with(groups: Sequence[ActorGroup], batch: RolloutBatch, replace: Replace | None = None) -> ScoredPart:
    """The scores of every response by these roles, all at once: handles of `Scores`.

    A role that is lost is asked again once `replace` has brought it back.
    """

    async def ask(group: ActorGroup) -> list[Any]:
        each = [(ids,) for ids in _deal(batch.infos, group.ranks)]
        while True:
            try:
                return await group.call("score", *batch.handles, each=each)
            except ActorLost as lost:
                if replace is None:
                    raise
                await replace(group.role, lost)

    answers = [answer for ranks in await together(*map(ask, groups)) for answer in ranks]
    failed = {sample: reason for failures, _ in answers for sample, reason in failures.items()}
    return ScoredPart(tuple(handle for _, handle in answers), failed)


@dataclass(frozen=True, slots=True)
class TextPlan:
    """PPO-ptx: where text comes from, and how much of it."""

    stream: TextStream
    blocks_per_response: float
    measure_every: int
    """steps between measurements of the gradient norms"""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How a step's responses become minibatches."""

    minibatch_size: int
    epochs: int
    seed: int
    samples_per_prompt: int
    value_warmup_steps: int
    first_kl_limit: float
    """see `LearnerRoles.update`"""
    learning_rates: Callable[[int], tuple[float, float]]
    """the policy's and the value model's, by step"""
    text: TextPlan | None = None


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """What an update learned from, in ids, and how fast."""

    minibatches: list[list[int]]
    """sample ids of each, over all ranks"""
    text: list[list[int]] | None
    """the numbers of each minibatch's text blocks; None without PPO-ptx"""
    rates: dict[str, float]
    """learning rate by role"""


class LearnerRoles:
    """Policy and value: estimate on the policy's ranks, update on both at once."""

    last: UpdateRecord | None = None
    """of the newest update"""

    def __init__(self, policy: ActorGroup, value: ActorGroup | None, plan: StepPlan) -> None:
        """Without a value model (`value` None) the policy learns alone."""
        self._policy = policy
        self._value = value
        self._plan = plan

    async def estimate(self, batch: ScoredBatch, kl_coef: float) -> ExperienceBatch:
        infos, rollouts = batch.rollouts.infos, batch.rollouts.handles
        results = await self._policy.call(
            "estimate",
            kl_coef,
            batch.version,
            len(rollouts),
            *rollouts,
            *batch.scores,
            each=[(ids,) for ids in _deal(infos, self._policy.ranks, self._plan.samples_per_prompt)],
        )
        (metrics, samples), _ = results[0]
        return ExperienceBatch(infos, tuple(handle for _, handle in results), metrics, samples)

    async def update(self, experience: ExperienceBatch, step: int) -> StepReport:
        """Raises TrainingError when policy and reference, the same model on step 0, do not score tokens alike."""
        plan, first_kl = self._plan, abs(experience.metrics["kl/per_token"])
        if step == 0 and not first_kl <= plan.first_kl_limit:
            raise TrainingError(
                f"KL to the reference is {first_kl:.3g} nats per token before any update "
                f"(allowed {plan.first_kl_limit:g})",
                "policy and reference were loaded from different weights, or run in different precision",
            )
        minibatches = self._minibatches(experience.infos, step)
        policy_rate, value_rate = plan.learning_rates(step)
        calls, text = [], None
        if step >= plan.value_warmup_steps:
            text = self._text(minibatches, step)
            calls.append(self._learn(self._policy, experience, minibatches, text, policy_rate))
        else:
            policy_rate = 0.0
        ids = [[info.sample_id for info in minibatch] for minibatch in minibatches]
        self.last = UpdateRecord(ids, text and text[0], {"policy": policy_rate, "value": value_rate})
        if self._value is not None:
            calls.append(self._learn(self._value, experience, minibatches, None, value_rate))
        metrics = dict(experience.metrics)
        for learned in await together(*calls):
            metrics |= learned
        metrics["policy/learning_rate"] = policy_rate
        # An adaptive KL coefficient has nothing to steer before the policy learns: 0 samples leave it where it is.
        steered = len(experience.infos) if step >= plan.value_warmup_steps else 0
        return StepReport(metrics, experience.metrics["kl/mean"], steered)

    async def _learn(
        self,
        group: ActorGroup,
        experience: ExperienceBatch,
        minibatches: list[list[RolloutInfo]],
        text: tuple[list[list[int]], bool] | None,
        rate: float,
    ) -> dict[str, float]:
        dealt = [_deal(minibatch, group.ranks) for minibatch in minibatches]
        each = []
        for rank in range(group.ranks):
            # Blocks are equally long: every so manieth is a fair share.
            share = text and ([blocks[rank :: group.ranks] for blocks in text[0]], text[1])
            each.append(([ids[rank] for ids in dealt], share))
        results = await group.call("update", rate, *experience.handles, each=each)
        metrics: dict[str, float] = results[0]
        return metrics

    def _text(self, minibatches: list[list[RolloutInfo]], step: int) -> tuple[list[list[int]], bool] | None:
        """For each minibatch the numbers of its text blocks, and whether gradient norms are to be measured."""
        plan = self._plan.text
        if plan is None:
            return None
        counts = [max(1, round(plan.blocks_per_response * len(minibatch))) for minibatch in minibatches]
        return [plan.stream.take(count) for count in counts], step % plan.measure_every == 0

    def _minibatches(self, infos: Sequence[RolloutInfo], step: int) -> list[list[RolloutInfo]]:
        """A fresh shuffle for each inner epoch, the same for policy and value."""
        cuts: list[list[RolloutInfo]] = []
        by_id = sorted(infos, key=lambda info: info.sample_id)  # engines finish in any order
        for epoch in range(self._plan.epochs):
            order = np.random.default_rng([self._plan.seed, step, epoch]).permutation(len(by_id))
            for start in range(0, len(by_id), self._plan.minibatch_size):
                cuts.append([by_id[int(i)] for i in order[start : start + self._plan.minibatch_size]])
        return cuts


def _deal(infos: Sequence[RolloutInfo], ranks: int, together: int = 1) -> list[list[int]]:
    """Sample ids for each rank, balanced by tokens; `together` consecutive samples (of one prompt) are not parted."""
    if ranks == 1:
        return [sorted(info.sample_id for info in infos)]
    units: dict[int, list[RolloutInfo]] = {}
    for info in sorted(infos, key=lambda info: info.sample_id):
        units.setdefault(info.sample_id // together, []).append(info)
    members = list(units.values())
    shares = balance([sum(info.tokens for info in unit) for unit in members], ranks)
    return [[info.sample_id for i in share for info in members[i]] for share in shares]


async def memory_per_role(groups: Sequence[ActorGroup]) -> dict[str, float]:
    """memory/<role>_gib: of the role's largest rank, unless it is lost: the next call that matters will find out."""

    async def ask(group: ActorGroup) -> dict[str, float]:
        try:
            return {f"memory/{group.role}_gib": max(await group.call("memory_gib"))}
        except ActorLost:
            return {}

    answers = await asyncio.gather(*(ask(group) for group in groups))
    return {name: value for answer in answers for name, value in answer.items()}
