"""`estimate`: scored rollouts in, experience out; the first half of a PPO step on one rank of the policy.

score ─► normalise, clip, truncated? ─┐
log-probs ─► KL to the reference ─────┴─► token rewards ─► advantages ─► whitening (moments over all ranks)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rayrlhf.algorithms import (
    kl_estimate,
    masked_moments,
    token_rewards,
    treat_truncated,
    truncated_importance_weights,
    whiten_with_moments,
)
from rayrlhf.algorithms.advantages import ESTIMATORS
from rayrlhf.data.batching import pad_rows
from rayrlhf.engines.distributed import all_reduce_max, all_reduce_sum, reduce_means
from rayrlhf.errors import TrainingError
from rayrlhf.types import Experience, Rollout, Scores

__all__ = ["EstimateSettings", "GapLimits", "check_gap", "estimate"]

# Nats by which rounding may lift the log-prob of a token that is certain.
ROUNDED_UP = 1e-3


@dataclass(frozen=True, slots=True)
class GapLimits:
    """How far two passes that should agree may differ in log-probs: at the worst token, and on average."""

    largest: float = math.inf
    mean: float = math.inf

    def hold(self, largest: float, mean: float) -> bool:
        return largest <= self.largest and mean <= self.mean  # a NaN does not hold


@dataclass(frozen=True, slots=True)
class EstimateSettings:
    kl_kind: Literal["k1", "k2", "k3"]
    gamma: float
    lam: float
    advantage: str = "gae"
    group_size: int = 1
    """Responses of consecutive sample ids that answer the same prompt."""
    normalize: bool = False
    score_clip: float | None = None
    truncated: Literal["keep", "penalty", "replace", "mask"] = "keep"
    truncated_value: float = 0.0
    old_from_rollout: bool = False
    """The engine's log-probs stand for the policy's, which has not scored the rollouts."""
    importance_cap: float | None = None
    gap: GapLimits = field(default_factory=GapLimits)
    """Between engine and trainer; checked here where the trainer has scored the rollouts."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """This rank's rollouts as padded rows; no rows where there are fewer rollouts than ranks."""

    rollouts: Sequence[Rollout]
    logprobs_BR: Tensor
    engine_BR: Tensor
    reference_BR: Tensor
    values_BR: Tensor | None
    scores_B: Tensor
    truncated_B: Tensor
    mask_BR: Tensor
    """bool: the response tokens"""
    trained_BR: Tensor
    """bool: those that are trained on"""


def estimate(
    rollouts: Sequence[Rollout],
    scores: Scores,
    settings: EstimateSettings,
    kl_coef: float,
    device: torch.device,
    version: int = 0,
) -> tuple[list[Experience], dict[str, float]]:
    """Rewards, advantages and returns for this rank's rollouts.

    reward_t = -kl_coef * KL_t, plus the score at the last response token (Ouyang et al. 2022, eq. 2); advantages by
    the estimator of the settings, those of GAE whitened over the trained tokens of all ranks.

    Args:
        version: of the policy that scored them; engine and trainer must agree on what that version sampled.

    Returns:
        Experiences in the order of `rollouts`, and metrics averaged over all ranks.

    Raises:
        TrainingError: on every rank, when any score or log-prob is not finite or an engine's log-prob is above 0 (such
            a sample must not train), or when engine and trainer differ by more than `settings.gap`.
    """
    batch = _collate(rollouts, scores, settings, device)
    _check_numbers(batch)
    kl_BR = kl_estimate(batch.logprobs_BR, batch.reference_BR, settings.kl_kind)
    shaped_B = _shape_scores(batch, settings)
    rewards_BR = token_rewards(shaped_B, kl_BR, batch.trained_BR, kl_coef)
    advantages_BR, returns_BR = _advantages(batch, rewards_BR, settings)
    weights_BR, weight_metrics = _importance_weights(batch, settings)
    metrics = _metrics(batch, kl_BR, shaped_B) | weight_metrics
    if not settings.old_from_rollout:
        metrics |= _gap(batch, version, settings.gap)
    if returns_BR is not None and batch.values_BR is not None:
        residual_BR = returns_BR - batch.values_BR
        metrics["value/explained_variance"] = _explained_variance(residual_BR, returns_BR, batch.trained_BR)

    def row(tensor: Tensor | None, i: int) -> np.ndarray | None:
        return None if tensor is None else tensor[i, : rollouts[i].info.response_tokens].cpu().numpy()

    experiences = [
        Experience(
            rollout=rollout,
            old_logprobs=batch.logprobs_BR[i, : rollout.info.response_tokens].cpu().numpy(),
            advantages=advantages_BR[i, : rollout.info.response_tokens].cpu().numpy(),
            returns=row(returns_BR, i),
            old_values=row(batch.values_BR, i),
            weights=row(weights_BR, i),
            trained=bool(batch.trained_BR[i, 0]),
        )
        for i, rollout in enumerate(rollouts)
    ]
    return experiences, metrics


def _collate(rollouts: Sequence[Rollout], scores: Scores, settings: EstimateSettings, device: torch.device) -> _Batch:
    ids = [r.info.sample_id for r in rollouts]
    lengths = torch.tensor([r.info.response_tokens for r in rollouts], dtype=torch.int64, device=device)
    widest = max((r.info.response_tokens for r in rollouts), default=0)
    mask_BR = torch.arange(widest, device=device)[None, :] < lengths[:, None]

    def rows(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(pad_rows(arrays, 0.0, np.float32)).to(device)

    engine_BR = rows([r.logprobs for r in rollouts])
    truncated_B = torch.tensor([r.info.truncated for r in rollouts], dtype=torch.bool, device=device)
    masked_B = truncated_B & (settings.truncated == "mask")
    return _Batch(
        rollouts=rollouts,
        logprobs_BR=engine_BR if settings.old_from_rollout else rows([scores.logprobs[i] for i in ids]),
        engine_BR=engine_BR,
        reference_BR=rows([scores.reference_logprobs[i] for i in ids]),
        values_BR=rows([scores.values[i] for i in ids]) if ESTIMATORS[settings.advantage].needs_values else None,
        scores_B=torch.tensor([scores.rewards[i] for i in ids], dtype=torch.float32, device=device),
        truncated_B=truncated_B,
        mask_BR=mask_BR,
        trained_BR=mask_BR & ~masked_B[:, None],
    )


def _shape_scores(batch: _Batch, settings: EstimateSettings) -> Tensor:
    """The reward model's scores as they enter the reward: [B]."""
    scores_B = batch.scores_B
    if settings.normalize:
        kept_B = torch.ones_like(batch.truncated_B) if settings.truncated != "mask" else ~batch.truncated_B
        scores_B = _whiten(scores_B, kept_B)
    if settings.score_clip is not None:
        scores_B = scores_B.clamp(-settings.score_clip, settings.score_clip)
    return treat_truncated(scores_B, batch.truncated_B, settings.truncated, settings.truncated_value)


def _advantages(batch: _Batch, rewards_BR: Tensor, settings: EstimateSettings) -> tuple[Tensor, Tensor | None]:
    """(advantages, returns), [B, R] each; no returns where the estimator compares whole responses."""
    estimator, mask_BR, values_BR = ESTIMATORS[settings.advantage], batch.trained_BR, batch.values_BR
    if estimator.of_tokens is not None and values_BR is not None:
        advantages_BR, returns_BR = estimator.of_tokens(rewards_BR, values_BR, mask_BR, settings.gamma, settings.lam)
        return _whiten(advantages_BR, mask_BR), returns_BR
    assert estimator.of_responses is not None
    advantages_BR = torch.zeros_like(rewards_BR)
    kept = [i for i in range(len(batch.rollouts)) if bool(mask_BR[i, 0])]  # a masked response is nobody's baseline
    if kept:
        groups = torch.tensor([batch.rollouts[i].info.sample_id // settings.group_size for i in kept])
        compared = estimator.of_responses(rewards_BR[kept].sum(1), groups.to(rewards_BR.device))
        advantages_BR[kept] = torch.where(mask_BR[kept], compared[:, None], 0.0)
    return advantages_BR, None


def _whiten(x: Tensor, mask: Tensor) -> Tensor:
    """By the moments of all ranks."""
    count, total, squares = all_reduce_sum(torch.stack(masked_moments(x, mask))).unbind()
    return whiten_with_moments(x, mask, count, total, squares)


def _importance_weights(batch: _Batch, settings: EstimateSettings) -> tuple[Tensor | None, dict[str, float]]:
    """Weights of the policy loss [B, R], where the trainer has scored what the engine sampled and a cap is set."""
    if settings.importance_cap is None or settings.old_from_rollout:
        return None, {}
    weights_BR, sums = truncated_importance_weights(
        batch.logprobs_BR, batch.engine_BR, batch.trained_BR, settings.importance_cap, denominator=1.0
    )
    tokens = float(batch.trained_BR.sum())
    means = {
        "rollout/importance_weight": (float(sums["weight_mean"]), tokens),
        "rollout/importance_capped_fraction": (float(sums["capped_fraction"]), tokens),
    }
    return weights_BR, reduce_means(means, weights_BR.device)


def _check_numbers(batch: _Batch) -> None:
    """Raise TrainingError on every rank when any is impossible. The engine's log-probs are looked at for themselves:
    where an older policy sampled, no gap would show a wrong one."""
    given = {
        "reward": batch.scores_B,
        "log-prob": batch.logprobs_BR,
        "engine's log-prob": batch.engine_BR,
        "reference log-prob": batch.reference_BR,
        "value": batch.values_BR,
    }
    wrong = {f"the {name} of sample {{}} is not finite": ~x.isfinite() for name, x in given.items() if x is not None}
    wrong["the engine's log-prob of sample {} is above 0"] = batch.engine_BR > ROUNDED_UP
    ids = [rollout.info.sample_id for rollout in batch.rollouts]
    bad = [what.format(sample) for what, at in wrong.items() for i, sample in enumerate(ids) if bool(at[i].any())]
    if all_reduce_max(1.0 if bad else 0.0, batch.scores_B.device):  # all stop, or the others would wait for this one
        here = bad[0] if bad else "a number on another rank is not finite, or no log-prob"
        raise TrainingError(here, "see the logs of the role it comes from")


def _metrics(batch: _Batch, kl_BR: Tensor, shaped_B: Tensor) -> dict[str, float]:
    responses, tokens = float(len(batch.rollouts)), float(batch.mask_BR.sum())
    scores, mask_BR, device = batch.scores_B.double(), batch.mask_BR, batch.scores_B.device
    rewarded_B = batch.trained_BR.any(1)  # a masked response's score enters no reward
    kl = float(kl_BR[mask_BR].double().sum())
    sums = {
        # E[-log pi] under pi is the entropy: the sampled tokens estimate it without a pass over the vocabulary.
        "policy/entropy": (-float(batch.logprobs_BR[mask_BR].double().sum()), tokens),
        "reward/mean": (float(scores.sum()), responses),
        "reward/square": (float(scores.square().sum()), responses),
        "reward/shaped_mean": (float(shaped_B[rewarded_B].double().sum()), float(rewarded_B.sum())),
        "kl/mean": (kl, responses),
        "kl/per_token": (kl, tokens),
        "response/length_mean": (tokens, responses),
        "response/truncated_fraction": (float(batch.truncated_B.sum()), responses),
    }
    metrics = reduce_means(sums, device)
    metrics["reward/std"] = max(0.0, metrics.pop("reward/square") - metrics["reward/mean"] ** 2) ** 0.5
    return metrics


def _gap(batch: _Batch, version: int, limits: GapLimits) -> dict[str, float]:
    """Between engine and trainer, over the tokens that this version sampled; NaN, and unchecked, where there are none.

    What an older version sampled differs by what was learned since too, and nothing tells the two apart: that gap is
    reported under a name of its own, where there is one, and not checked.
    """
    rows = [r.versions == version for r in batch.rollouts]
    fresh_BR = torch.from_numpy(pad_rows(rows, False, np.bool_)).to(batch.mask_BR.device)
    metrics = {"rollout/logprob_gap": math.nan, "rollout/logprob_gap_max": math.nan}
    for name, sampled_BR, allowed in (("", fresh_BR, limits), ("stale_", ~fresh_BR, GapLimits())):
        gap = (batch.logprobs_BR - batch.engine_BR)[sampled_BR & batch.mask_BR].double().abs()
        mean = reduce_means({"gap": (float(gap.sum()), float(len(gap)))}, gap.device)["gap"]
        largest = all_reduce_max(float(gap.max()) if len(gap) else -1.0, gap.device)
        if largest >= 0:
            check_gap(largest, mean, allowed)
            metrics |= {f"rollout/{name}logprob_gap": mean, f"rollout/{name}logprob_gap_max": largest}
    return metrics


def check_gap(largest: float, mean: float, limits: GapLimits) -> None:
    """Raise TrainingError when the engine that sampled and the trainer are not the same policy."""
    if not limits.hold(largest, mean):
        raise TrainingError(
            f"engine and trainer differ by {largest:.3g} in the log-prob of a token (mean {mean:.3g}; allowed "
            f"{limits.largest:.3g}, mean {limits.mean:.3g})",
            "the engine samples from another policy than the one that learns; rollout.max_logprob_gap sets the limit",
        )


def _explained_variance(residual_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the trained tokens of all ranks."""

    def variance(x: Tensor) -> float:
        count, total, squares = (float(m) for m in all_reduce_sum(torch.stack(masked_moments(x, mask_BR))))
        return max(0.0, squares / count - (total / count) ** 2) if count else 0.0

    residual, spread = variance(residual_BR), variance(returns_BR)
    return 1.0 - residual / spread if spread > 0 else float("nan")
