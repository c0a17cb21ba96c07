"""The second half of a PPO step on one rank: `update_policy` and `update_value` learn from experience.

experiences ──► update_policy   clipped ratio loss, and with ptx the LM loss of text  ┐ minibatch by minibatch, each in
           └──► update_value    clipped squared error                                 ┘ micro-batches; every loss is a
                                                                          token mean over the global minibatch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayrlhf.algorithms import ppo_policy_loss, ppo_value_loss, truncated_importance_weights
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample
from rayrlhf.engines.batches import ExperienceBatch, cut_experiences, dummy_experience
from rayrlhf.engines.deepspeed import Learner
from rayrlhf.engines.distributed import all_reduce_max, all_reduce_sum, reduce_means
from rayrlhf.engines.estimation import GapLimits, check_gap
from rayrlhf.engines.tasks import LanguageBatch, LanguageTask, language_batches
from rayrlhf.errors import TrainingError
from rayrlhf.types import Experience

__all__ = ["TextShare", "UpdateSettings", "update_policy", "update_value"]

Module = Callable[..., Tensor]
POLICY_STATS = ("loss", "abs_log_ratio", "clip_fraction", "ratio_mean", "approx_kl", "weight_mean", "capped_fraction")


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """The policy's or the value model's; what is said of the policy concerns it alone."""

    clip: float
    cutting: Cutting
    temperature: float = 1.0
    """The policy's."""
    dual_clip: float | None = None
    """The policy's."""
    kl_stop: float | None = None
    """The policy's: nats per response from the step's start, past which its remaining minibatches are left out."""
    ratio_cap: float | None = None
    """The policy's, where the old log-probs are the engine's: the largest ratio to them. The first minibatch then shows
    the gap, not ratio 1."""
    first_ratio: GapLimits = field(default_factory=GapLimits)
    """The policy's: |log ratio| that the first minibatch of a step may show."""
    ptx_coef: float = 0.0


@dataclass(frozen=True, slots=True)
class TextShare:
    """This rank's pretraining text for one step of PPO-ptx."""

    blocks: np.ndarray
    """int32 [blocks, L]: all text there is"""
    rows: Sequence[Sequence[int]]
    """for each minibatch, which blocks this rank learns from"""
    measure: bool = False
    """Measure both parts' gradient norms on the first minibatch."""


def update_policy(
    learner: Learner,
    experiences: Sequence[Experience],
    minibatches: Sequence[Sequence[int]],
    spare: Experience,
    settings: UpdateSettings,
    learning_rate: float,
    text: TextShare | None = None,
) -> dict[str, float]:
    """PPO's clipped loss (Schulman et al. 2017, eq. 7), one optimizer step per minibatch.

    With `text` it is PPO-ptx (Ouyang et al. 2022, eq. 2): `ptx_coef` times the text's language-modelling loss joins
    in; each is a token mean of its own over the global minibatch, and the gradients add up before the one step.

    Args:
        minibatches: for each minibatch, which of `experiences` this rank works on; all ranks have equally many.

    Raises:
        TrainingError: when the first minibatch, before any update, does not see ratio 1: the passes that made the
            old and the new log-probs then differ in something they should not. With a `ratio_cap`, when engine and
            trainer differ by more than `first_ratio`.
    """

    def loss(module: Module, batch: ExperienceBatch | LanguageBatch, totals: _Totals, stats: _Stats) -> Tensor:
        if isinstance(batch, LanguageBatch):
            value = LanguageTask.loss(module, batch, totals.text_tokens)
            stats.add({"ptx_loss": value})
            return settings.ptx_coef * value
        return _policy_loss(module, batch, settings, totals.tokens, stats)

    names = [*POLICY_STATS, "ptx_loss"] if text else POLICY_STATS
    update = _Update(learner, experiences, spare, settings, learning_rate, loss, names)
    for number, rows in enumerate(minibatches):
        done = update.minibatch(rows, text, number)
        if number == 0:
            _check_first_ratio(done, settings)
        if settings.kl_stop is not None and done["approx_kl"] * done["tokens"] > settings.kl_stop * done["responses"]:
            break
    return _policy_metrics(update, settings, text)


def _policy_metrics(update: _Update, settings: UpdateSettings, text: TextShare | None) -> dict[str, float]:
    means, first = update.means(), update.history[0]
    # Nobody has looked where all responses of the first minibatch are masked: a gap of 0 would be made up.
    largest, mean = (first[key] if first["tokens"] else math.nan for key in ("max_abs_log_ratio", "abs_log_ratio"))
    metrics = {f"policy/{name}": means[name] for name in ("loss", "grad_norm", "clip_fraction", "ratio_mean")}
    metrics |= {
        "policy/approx_kl_per_token": means["approx_kl"],
        "policy/first_log_ratio_max": largest,
        "policy/minibatches": float(len(update.history)),
    }
    if settings.ratio_cap is not None:
        metrics["rollout/logprob_gap"] = mean
        metrics["rollout/logprob_gap_max"] = largest
        metrics["rollout/importance_weight"] = means["weight_mean"]
        metrics["rollout/importance_capped_fraction"] = means["capped_fraction"]
    if text is not None:
        metrics["ptx/loss"] = means["ptx_loss"]
    if "rest_norm" in first:
        metrics |= {"ptx/grad_norm": first["rest_norm"], "policy/ppo_grad_norm": first["first_norm"]}
    return metrics


def _policy_loss(
    module: Module, batch: ExperienceBatch, settings: UpdateSettings, tokens: float, stats: _Stats
) -> Tensor:
    rollouts = batch.batch
    logprobs = module(**rollouts.layout.inputs, positions=rollouts.positions, temperature=settings.temperature)
    log_ratio = logprobs.detach() - batch.old_logprobs
    weights, weighed = batch.weights, dict[str, Tensor]()
    if settings.ratio_cap is not None:
        # The ratio is itself the importance weight; this factor makes it min(ratio, cap).
        weights = (math.log(settings.ratio_cap) - log_ratio).clamp(max=0.0).exp()
        _, weighed = truncated_importance_weights(logprobs, batch.old_logprobs, batch.mask, settings.ratio_cap, tokens)
    value, parts = ppo_policy_loss(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.mask,
        settings.clip,
        settings.dual_clip,
        weights,
        denominator=tokens,
    )
    ratio = float(parts.pop("max_abs_log_ratio"))
    mean = log_ratio.abs()[batch.mask].sum() / max(tokens, 1.0)
    stats.add({"loss": value, "abs_log_ratio": mean, **parts, **weighed})
    stats.maximum = max(stats.maximum, math.inf if math.isnan(ratio) else ratio)  # max() would drop a NaN
    return value


def update_value(
    learner: Learner,
    experiences: Sequence[Experience],
    minibatches: Sequence[Sequence[int]],
    spare: Experience,
    settings: UpdateSettings,
    learning_rate: float,
) -> dict[str, float]:
    """Half the clipped squared error to the returns; otherwise as `update_policy`."""

    def loss(module: Module, batch: ExperienceBatch, totals: _Totals, stats: _Stats) -> Tensor:
        rollouts = batch.batch
        values = module(**rollouts.layout.inputs, positions=rollouts.positions - 1)
        assert batch.old_values is not None
        assert batch.returns is not None
        value, parts = ppo_value_loss(
            values, batch.old_values, batch.returns, batch.mask, settings.clip, denominator=totals.tokens
        )
        stats.add({"loss": value, "clip_fraction": parts["clip_fraction"]})
        return value

    update = _Update(learner, experiences, spare, settings, learning_rate, loss, ("loss", "clip_fraction"))
    for number, rows in enumerate(minibatches):
        update.minibatch(rows, None, number)
    means = update.means()
    return {f"value/{name}": means[name] for name in ("loss", "grad_norm", "clip_fraction")}


@dataclass(frozen=True, slots=True)
class _Totals:
    """Of one minibatch, over all ranks: what its losses are divided by."""

    tokens: float
    """response tokens trained on"""
    responses: float
    text_tokens: float


@dataclass(slots=True)
class _Stats:
    """This rank's sums of the token means that a loss reports, over the micro-batches of one minibatch."""

    sums: dict[str, float] = field(default_factory=dict)
    maximum: float = 0.0

    def add(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())


@dataclass
class _Update:
    """One step's minibatches: the loop that policy and value share."""

    learner: Learner
    experiences: Sequence[Experience]
    spare: Experience
    settings: UpdateSettings
    learning_rate: float
    loss: Callable[[Module, Any, _Totals, _Stats], Tensor]
    names: Sequence[str]
    """what `loss` may add to the stats; the same on every rank"""
    history: list[dict[str, float]] = field(default_factory=list)

    def minibatch(self, rows: Sequence[int], text: TextShare | None, number: int) -> dict[str, float]:
        """One optimizer step; what it measured, over all ranks."""
        learner, device = self.learner, self.learner.device
        mine = [self.experiences[i] for i in rows]
        blocks = [LMExample(text.blocks[i], 0, "") for i in text.rows[number]] if text else []
        totals, stats = self._totals(mine, blocks), _Stats()
        step = learner.train_step(
            lambda module, batch: self.loss(module, batch, totals, stats),
            cut_experiences(mine, self.settings.cutting, device),
            dummy_experience(self.spare, device),
            self.learning_rate,
            rest=language_batches(blocks, self.settings.cutting, device),
            measure=text is not None and text.measure and number == 0,
        )
        # Shares of a global mean add up over ranks: reduce_means' count is spread so that it sums to one.
        share = 1.0 / learner.world_size
        reduced = reduce_means({name: (stats.sums.get(name, 0.0), share) for name in self.names}, device)
        reduced |= {name: value for name, value in step.items() if name != "loss"}
        reduced["max_abs_log_ratio"] = all_reduce_max(stats.maximum, device)
        reduced["responses"], reduced["tokens"] = totals.responses, totals.tokens
        self.history.append(reduced)
        return reduced

    def means(self) -> dict[str, float]:
        """Over the minibatches so far; of what is a mean over trained tokens, over those that had any (NaN: none had).

        A minibatch whose responses are all masked out has no ratio, and must not count as one of ratio 0.
        """

        def mean(name: str, steps: Sequence[dict[str, float]]) -> float:
            return sum(step[name] for step in steps) / len(steps) if steps else math.nan

        trained = [step for step in self.history if step["tokens"]]
        by_step = {name: mean(name, self.history) for name in ("grad_norm", "ptx_loss") if name in self.history[0]}
        return {name: mean(name, trained) for name in self.names} | by_step

    def _totals(self, mine: Sequence[Experience], blocks: Sequence[LMExample]) -> _Totals:
        trained = [e.rollout.info.response_tokens for e in mine if e.trained]
        local = [sum(trained), len(trained), sum(len(b.tokens) - 1 for b in blocks)]
        totals = all_reduce_sum(torch.tensor(local, dtype=torch.float64, device=self.learner.device))
        return _Totals(*totals.tolist())


def _check_first_ratio(reduced: dict[str, float], settings: UpdateSettings) -> None:
    largest, mean, limits = reduced["max_abs_log_ratio"], reduced["abs_log_ratio"], settings.first_ratio
    if settings.ratio_cap is not None:
        check_gap(largest, mean, limits)
    elif not limits.hold(largest, mean):
        raise TrainingError(
            f"the first minibatch saw log ratios up to {largest:.3g} (mean {mean:.3g}) where they must be 0 (allowed "
            f"{limits.largest:.3g}, mean {limits.mean:.3g})",
            "old and new log-probs come from different weights, positions, temperature or dropout",
        )
