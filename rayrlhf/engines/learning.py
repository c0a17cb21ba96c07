"""One PPO step on one rank: `estimate` turns scored rollouts into experience, `update_policy` and `update_value` learn.

rollouts + scores (this rank's share)
   │ estimate          token KL -> token rewards -> GAE -> whitening (moments over all ranks)
   ▼
experiences ──► update_policy   clipped ratio loss      ┐ minibatch by minibatch; each minibatch in micro-batches,
           └──► update_value    clipped squared error   ┘ every loss a token mean over the global minibatch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rayrlhf.algorithms import (
    gae,
    kl_estimate,
    masked_moments,
    ppo_policy_loss,
    ppo_value_loss,
    token_rewards,
    whiten_with_moments,
)
from rayrlhf.data.batching import Cutting, pad_rows
from rayrlhf.engines.batches import ExperienceBatch, cut_experiences, dummy_experience
from rayrlhf.engines.deepspeed import Learner
from rayrlhf.engines.distributed import all_reduce_max, all_reduce_sum, reduce_means
from rayrlhf.errors import TrainingError
from rayrlhf.types import Experience, Rollout, Scores

__all__ = ["EstimateSettings", "UpdateSettings", "estimate", "update_policy", "update_value"]

Module = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class EstimateSettings:
    kl_kind: Literal["k1", "k2", "k3"]
    gamma: float
    lam: float


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    clip: float
    cutting: Cutting
    temperature: float = 1.0
    """The policy's only."""
    first_log_ratio_max: float = math.inf
    """The policy's only: the largest |log ratio| that the first minibatch of a step may show (see `update_policy`)."""
    first_log_ratio_mean: float = math.inf
    """... and the largest mean of them over its tokens."""


def estimate(
    rollouts: Sequence[Rollout], scores: Scores, settings: EstimateSettings, kl_coef: float, device: torch.device
) -> tuple[list[Experience], dict[str, float]]:
    """Rewards, advantages and returns for this rank's rollouts.

    reward_t = -kl_coef * KL_t, plus the score at the last response token (Ouyang et al. 2022, eq. 2); advantages by
    GAE (Schulman et al. 2016, eq. 16), whitened over the valid tokens of all ranks.

    Returns:
        Experiences in the order of `rollouts`, and metrics averaged over all ranks.

    Raises:
        TrainingError: on every rank, when any score or log-prob is not finite: such a sample must not train.
    """
    mask_BR = _mask([r.info.response_tokens for r in rollouts], device)

    def rows(field: dict[int, np.ndarray]) -> Tensor:
        padded = pad_rows([field[r.info.sample_id] for r in rollouts], 0.0, np.float32)
        return torch.from_numpy(padded).to(device)

    if rollouts:
        logprobs_BR, reference_BR, values_BR = (
            rows(scores.logprobs),
            rows(scores.reference_logprobs),
            rows(scores.values),
        )
        scores_B = torch.tensor([scores.rewards[r.info.sample_id] for r in rollouts], device=device)
        engine_BR = rows({r.info.sample_id: r.logprobs for r in rollouts})
    else:  # fewer samples than ranks: this one only takes part in the reductions
        logprobs_BR = reference_BR = values_BR = engine_BR = torch.zeros(0, 0, device=device)
        scores_B = torch.zeros(0, device=device)
    _check_finite(rollouts, scores, device)
    kl_BR = kl_estimate(logprobs_BR, reference_BR, settings.kl_kind)
    rewards_BR = token_rewards(scores_B, kl_BR, mask_BR, kl_coef)
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, settings.gamma, settings.lam)
    moments = all_reduce_sum(torch.stack(masked_moments(advantages_BR, mask_BR)))
    count, total, squares = moments.unbind()
    advantages_BR = whiten_with_moments(advantages_BR, mask_BR, count, total, squares)
    experiences = [
        Experience(
            rollout=rollout,
            old_logprobs=scores.logprobs[rollout.info.sample_id],
            advantages=advantages_BR[i, : rollout.info.response_tokens].cpu().numpy(),
            returns=returns_BR[i, : rollout.info.response_tokens].cpu().numpy(),
            old_values=scores.values[rollout.info.sample_id],
        )
        for i, rollout in enumerate(rollouts)
    ]
    metrics = _estimate_metrics(rollouts, scores_B, kl_BR, mask_BR, logprobs_BR, engine_BR)
    return experiences, metrics | {"value/explained_variance": _explained_variance(returns_BR, values_BR, mask_BR)}


def update_policy(
    learner: Learner,
    experiences: Sequence[Experience],
    minibatches: Sequence[Sequence[int]],
    spare: Experience,
    settings: UpdateSettings,
    learning_rate: float,
) -> dict[str, float]:
    """PPO's clipped loss (Schulman et al. 2017, eq. 7), one optimizer step per minibatch.

    Args:
        minibatches: for each minibatch, which of `experiences` this rank works on; all ranks have equally many.

    Raises:
        TrainingError: when the first minibatch, before any update, does not see ratio 1: the passes that made the
            old and the new log-probs then differ in something they should not.
    """

    def loss(module: Module, batch: ExperienceBatch, tokens: float, stats: _Stats) -> Tensor:
        logprobs = module(
            **batch.batch.layout.inputs, positions=batch.batch.positions, temperature=settings.temperature
        )
        value, parts = ppo_policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.mask, settings.clip, denominator=tokens
        )
        stats.add(parts, ("clip_fraction", "ratio_mean", "approx_kl"))
        log_ratio = (logprobs.detach() - batch.old_logprobs).abs()
        stats.add({"abs_log_ratio": log_ratio[batch.mask].sum() / tokens}, ("abs_log_ratio",))
        ratio = float(parts["max_abs_log_ratio"])
        stats.maximum = max(stats.maximum, math.inf if math.isnan(ratio) else ratio)  # max() would drop a NaN
        return value

    metrics = _update(learner, experiences, minibatches, spare, settings, learning_rate, loss, check_ratio=True)
    metrics["approx_kl_per_token"] = metrics.pop("approx_kl")
    del metrics["abs_log_ratio"]
    return {f"policy/{name}": value for name, value in metrics.items()}


def update_value(
    learner: Learner,
    experiences: Sequence[Experience],
    minibatches: Sequence[Sequence[int]],
    spare: Experience,
    settings: UpdateSettings,
    learning_rate: float,
) -> dict[str, float]:
    """Half the clipped squared error to the returns; otherwise as `update_policy`."""

    def loss(module: Module, batch: ExperienceBatch, tokens: float, stats: _Stats) -> Tensor:
        values = module(**batch.batch.layout.inputs, positions=batch.batch.positions - 1)
        value, parts = ppo_value_loss(
            values, batch.old_values, batch.returns, batch.mask, settings.clip, denominator=tokens
        )
        stats.add(parts, ("clip_fraction",))
        return value

    metrics = _update(learner, experiences, minibatches, spare, settings, learning_rate, loss, check_ratio=False)
    return {f"value/{name}": value for name, value in metrics.items()}


class _Stats:
    """This rank's sums of the token means that a loss reports, over the micro-batches of one minibatch."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.maximum = 0.0

    def add(self, parts: dict[str, Tensor], names: Sequence[str]) -> None:
        for name in names:
            self.sums[name] = self.sums.get(name, 0.0) + float(parts[name])


def _update(
    learner: Learner,
    experiences: Sequence[Experience],
    minibatches: Sequence[Sequence[int]],
    spare: Experience,
    settings: UpdateSettings,
    learning_rate: float,
    loss: Callable[[Module, ExperienceBatch, float, _Stats], Tensor],
    check_ratio: bool,
) -> dict[str, float]:
    dummy = dummy_experience(spare, learner.device)
    totals: dict[str, float] = {}
    for number, rows in enumerate(minibatches):
        mine = [experiences[i] for i in rows]
        local = torch.tensor(float(sum(e.rollout.info.response_tokens for e in mine)), device=learner.device)
        tokens = float(all_reduce_sum(local))
        stats = _Stats()
        step = learner.train_step(
            lambda module, batch, t=tokens, s=stats: loss(module, batch, t, s),
            cut_experiences(mine, settings.cutting, learner.device),
            dummy,
            learning_rate,
        )
        if check_ratio and number == 0:
            _check_first_ratio(stats, settings, learner.device)
        # Shares of a global mean add up over ranks: reduce_means' count is spread so that it sums to one.
        share = 1.0 / learner.world_size
        reduced = reduce_means(
            {name: (value, share) for name, value in {**stats.sums, "loss": step["loss"]}.items()}, learner.device
        )
        for name, value in {**reduced, "grad_norm": step["grad_norm"]}.items():
            totals[name] = totals.get(name, 0.0) + value
    return {name: value / len(minibatches) for name, value in totals.items()}


def _check_first_ratio(stats: _Stats, settings: UpdateSettings, device: torch.device) -> None:
    worst = all_reduce_max(stats.maximum, device)
    mean = float(all_reduce_sum(torch.tensor(stats.sums.get("abs_log_ratio", 0.0), device=device)))
    # Written so that a NaN does not pass.
    if not (worst <= settings.first_log_ratio_max and mean <= settings.first_log_ratio_mean):
        raise TrainingError(
            f"the first minibatch saw log ratios up to {worst:.3g} (mean {mean:.3g}) where they must be 0 (allowed "
            f"{settings.first_log_ratio_max:.3g}, mean {settings.first_log_ratio_mean:.3g})",
            "old and new log-probs come from different weights, positions, temperature or dropout",
        )


def _check_finite(rollouts: Sequence[Rollout], scores: Scores, device: torch.device) -> None:
    bad = ""
    for sample in (r.info.sample_id for r in rollouts):
        parts: dict[str, np.ndarray] = {
            "reward": np.asarray(scores.rewards[sample]),
            "log-prob": scores.logprobs[sample],
            "reference log-prob": scores.reference_logprobs[sample],
            "value": scores.values[sample],
        }
        for name, numbers in parts.items():
            if not np.isfinite(numbers).all():
                bad = f"the {name} of sample {sample} is not finite"
    if all_reduce_max(1.0 if bad else 0.0, device):  # all ranks stop, or the others would wait for this one
        raise TrainingError(bad or "a number on another rank is not finite", "see the logs of the role it comes from")


def _estimate_metrics(
    rollouts: Sequence[Rollout],
    scores_B: Tensor,
    kl_BR: Tensor,
    mask_BR: Tensor,
    logprobs_BR: Tensor,
    engine_BR: Tensor,
) -> dict[str, float]:
    responses, tokens = float(len(rollouts)), float(mask_BR.sum())
    kl = float(kl_BR[mask_BR].double().sum())
    gap = (logprobs_BR - engine_BR)[mask_BR].double().abs()
    sums = {
        # E[-log pi] under pi is the entropy: the sampled tokens estimate it without a pass over the vocabulary.
        "policy/entropy": (-float(logprobs_BR[mask_BR].double().sum()), tokens),
        "reward/mean": (float(scores_B.double().sum()), responses),
        "reward/square": (float(scores_B.double().square().sum()), responses),
        "kl/mean": (kl, responses),
        "kl/per_token": (kl, tokens),
        "response/length_mean": (tokens, responses),
        "response/truncated_fraction": (float(sum(r.info.truncated for r in rollouts)), responses),
        "rollout/logprob_gap": (float(gap.sum()), tokens),
    }
    metrics = reduce_means(sums, scores_B.device)
    metrics["reward/std"] = max(0.0, metrics.pop("reward/square") - metrics["reward/mean"] ** 2) ** 0.5
    metrics["rollout/logprob_gap_max"] = all_reduce_max(float(gap.max()) if len(gap) else 0.0, scores_B.device)
    return metrics


def _explained_variance(returns_BR: Tensor, values_BR: Tensor, mask_BR: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the valid tokens of all ranks."""

    def variance(x: Tensor) -> float:
        count, total, squares = (float(m) for m in all_reduce_sum(torch.stack(masked_moments(x, mask_BR))))
        return max(0.0, squares / count - (total / count) ** 2) if count else 0.0

    residual, spread = variance(returns_BR - values_BR), variance(returns_BR)
    return 1.0 - residual / spread if spread > 0 else float("nan")


def _mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """bool [B, R]: True on each row's first `length` positions."""
    widest = max(lengths, default=0)
    return torch.arange(widest, device=device)[None, :] < torch.tensor(lengths, device=device).reshape(-1, 1)
