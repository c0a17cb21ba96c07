"""The driver's view of the model roles: who scores, who learns, how the work is dealt to ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rayrlhf.actors.group import ActorGroup
from rayrlhf.data.batching import balance
from rayrlhf.driver.protocols import ExperienceBatch, Handle, RolloutBatch, ScoredBatch
from rayrlhf.errors import TrainingError
from rayrlhf.types import RolloutInfo, StepReport

__all__ = ["LearnerRoles", "ScorerRoles", "memory_per_role"]


class ScorerRoles:
    """Old log-probs (policy), reference log-probs, rewards and values, all roles at once."""

    def __init__(self, groups: Sequence[ActorGroup]) -> None:
        self._groups = groups

    async def score(self, batch: RolloutBatch) -> tuple[Handle, ...]:
        calls = [
            group.call("score", *batch.handles, each=[(ids,) for ids in _deal(batch.infos, group.ranks)])
            for group in self._groups
        ]
        results = await asyncio.gather(*calls)
        return tuple(handle for ranks in results for handles in ranks for handle in handles)


class LearnerRoles:
    """Policy and value: estimate on the policy's ranks, update on both at once."""

    def __init__(
        self,
        policy: ActorGroup,
        value: ActorGroup,
        minibatch_size: int,
        epochs: int,
        seed: int,
        first_kl_limit: float,
        learning_rates: Callable[[int], tuple[float, float]],
    ) -> None:
        """`learning_rates(step)` gives the policy's and the value model's; `first_kl_limit`: see `update`."""
        self._first_kl_limit = first_kl_limit
        self._policy = policy
        self._value = value
        self._minibatch_size = minibatch_size
        self._epochs = epochs
        self._seed = seed
        self._learning_rates = learning_rates

    async def estimate(self, batch: ScoredBatch, kl_coef: float) -> ExperienceBatch:
        infos, rollouts = batch.rollouts.infos, batch.rollouts.handles
        results = await self._policy.call(
            "estimate",
            kl_coef,
            len(rollouts),
            *rollouts,
            *batch.scores,
            each=[(ids,) for ids in _deal(infos, self._policy.ranks)],
        )
        handles = tuple(handle for handles, _, _ in results for handle in handles)
        return ExperienceBatch(infos, handles, results[0][1], results[0][2])

    async def update(self, experience: ExperienceBatch, step: int) -> StepReport:
        """Raises TrainingError when policy and reference, the same model on step 0, do not score tokens alike."""
        first_kl = abs(experience.metrics["kl/per_token"])
        if step == 0 and not first_kl <= self._first_kl_limit:
            raise TrainingError(
                f"KL to the reference is {first_kl:.3g} nats per token before any update "
                f"(allowed {self._first_kl_limit:g})",
                "policy and reference were loaded from different weights, or run in different precision",
            )
        minibatches = self._minibatches(experience.infos, step)
        policy_rate, value_rate = self._learning_rates(step)
        policy, value = await asyncio.gather(
            self._learn(self._policy, experience, minibatches, policy_rate),
            self._learn(self._value, experience, minibatches, value_rate),
        )
        metrics = {**experience.metrics, **policy, **value, "policy/learning_rate": policy_rate}
        return StepReport(metrics, experience.metrics["kl/mean"], len(experience.infos))

    async def _learn(
        self, group: ActorGroup, experience: ExperienceBatch, minibatches: list[list[RolloutInfo]], rate: float
    ) -> dict[str, float]:
        dealt = [_deal(minibatch, group.ranks) for minibatch in minibatches]
        each = [([ids[rank] for ids in dealt],) for rank in range(group.ranks)]
        results = await group.call("update", rate, *experience.handles, each=each)
        metrics: dict[str, float] = results[0]
        return metrics

    def _minibatches(self, infos: Sequence[RolloutInfo], step: int) -> list[list[RolloutInfo]]:
        """A fresh shuffle for each inner epoch, the same for policy and value."""
        cuts: list[list[RolloutInfo]] = []
        by_id = sorted(infos, key=lambda info: info.sample_id)  # engines finish in any order
        for epoch in range(self._epochs):
            order = np.random.default_rng([self._seed, step, epoch]).permutation(len(by_id))
            for start in range(0, len(by_id), self._minibatch_size):
                cuts.append([by_id[int(i)] for i in order[start : start + self._minibatch_size]])
        return cuts


def _deal(infos: Sequence[RolloutInfo], ranks: int) -> list[list[int]]:
    """Sample ids for each rank, balanced by tokens."""
    by_id = sorted(infos, key=lambda info: info.sample_id)
    return [[by_id[i].sample_id for i in share] for share in balance([info.tokens for info in by_id], ranks)]


async def memory_per_role(groups: Sequence[ActorGroup]) -> dict[str, float]:
    """memory/<role>_gib: of the role's largest rank."""
    results: list[list[Any]] = list(await asyncio.gather(*(group.call("memory_gib") for group in groups)))
    return {f"memory/{g.role}_gib": max(values) for g, values in zip(groups, results, strict=True)}
