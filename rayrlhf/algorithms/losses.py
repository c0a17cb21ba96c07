"""Losses of the recipe: PPO's policy (and the weights that correct it), value, ranking, DPO, language modelling.

Shapes: B sequences, R response positions, N responses; masks are bool. Masked losses are token means: a sum over
valid tokens divided by `denominator`, the token count of the *global* minibatch (the own mask's count when None).
With it, losses and stats of micro-batches and ranks add up to those of the whole (maxima excepted). An empty mask
gives 0, attached to the graph, so that a rank without tokens can still run its backward pass.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rayrlhf.algorithms.kl import LOG_RATIO_LIMIT, kl_estimate
from rayrlhf.algorithms.masking import at_least_float32, divide, masked_mean, zero_masked

__all__ = [
    "dpo_loss",
    "lm_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ranking_loss",
    "truncated_importance_weights",
]


def truncated_importance_weights(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    cap: float = 2.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh tokens that the rollout engine sampled so that they stand for samples of the trainer's policy.

    w_t = min(exp(logprobs_t - rollout_logprobs_t), cap)

    The cap bounds the variance, at the price of a bias. For `ppo_policy_loss(..., weights=w)`.

    Args:
        logprobs: [B, R], of the trainer at the weights the step started from (`old_logprobs` of the policy loss).
        rollout_logprobs: [B, R], of the engine that sampled.
        mask: [B, R].
        cap: the largest weight; positive and finite.
        denominator: global token count, for the stats.

    Returns:
        (weights, stats): [B, R], 0 at masked positions, and scalars; no gradients. `weight_mean` and `capped_fraction`
        (weights that the cap lowered) are token means.

    Source: Espeholt et al. 2018 (arXiv 1802.01561), section 4.1, the rho of V-trace; for the gap between a rollout
    engine and a trainer: Yao et al. 2025, "On the Rollout-Training Mismatch in Modern RL Systems" (cap 2).
    """
    if not 0 < cap < math.inf:
        raise ValueError(f"expected 0 < cap < infinity, found {cap}")
    log_gap = zero_masked(logprobs.detach(), mask) - zero_masked(rollout_logprobs.detach(), mask)
    ratio = log_gap.exp()  # may be infinite; the cap comes next, and there is no gradient to spoil
    weights = zero_masked(ratio.clamp(max=cap), mask)
    stats = {
        "weight_mean": masked_mean(weights, mask, denominator),
        "capped_fraction": masked_mean(ratio > cap, mask, denominator),
    }
    return weights, stats


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute PPO's clipped policy loss.

    ratio_t = exp(logprobs_t - old_logprobs_t)
    loss = -mean_t w_t * min(ratio_t A_t, clip(ratio_t, 1 - clip, 1 + clip) A_t)
    and with a dual clip c, where A_t < 0: max(min(...), c A_t) in place of min(...)

    Log-ratios are held to +-20 (`kl.LOG_RATIO_LIMIT`) before exp; beyond it a token gives no gradient.

    Args:
        logprobs: [B, R], of the policy in training; the only input that gets a gradient.
        old_logprobs: [B, R], of the policy at the start of the step.
        advantages: [B, R].
        mask: [B, R].
        clip: epsilon.
        dual_clip: c > 1, or None.
        weights: [B, R], truncated importance weights w_t, or None for 1.
        denominator: global token count.

    Returns:
        (loss, stats): a scalar, and detached scalars. `clip_fraction` (tokens whose loss the clip raised),
        `ratio_mean` and `approx_kl` (k3 of KL(old || new)) are token means like the loss; `max_abs_log_ratio` is a
        maximum, before the limit.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; dual clip: Ye et al. 2020 (arXiv 1912.09729), eq. 5.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"expected dual_clip > 1, found {dual_clip}")
    new, old = zero_masked(logprobs, mask), zero_masked(old_logprobs.detach(), mask)
    gain = zero_masked(advantages.detach(), mask)
    log_ratio = new - old
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    unclipped, clipped = -gain * ratio, -gain * ratio.clamp(1 - clip, 1 + clip)
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        losses = torch.where(gain < 0, torch.minimum(losses, -gain * dual_clip), losses)
    if weights is not None:
        losses = losses * zero_masked(weights.detach(), mask)
    with torch.no_grad():
        stats = {
            "clip_fraction": masked_mean(clipped > unclipped, mask, denominator),
            "ratio_mean": masked_mean(ratio, mask, denominator),
            "approx_kl": masked_mean(kl_estimate(old, new, "k3"), mask, denominator),
            "max_abs_log_ratio": torch.cat([log_ratio.abs().flatten(), log_ratio.new_zeros(1)]).amax(),
        }
    return masked_mean(losses, mask, denominator), stats


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute PPO's clipped value loss.

    clipped_t = clip(V_t, V_old_t - clip, V_old_t + clip)
    loss = 0.5 * mean_t max((V_t - returns_t)^2, (clipped_t - returns_t)^2)

    Args:
        values: [B, R], of the value model in training; the only input that gets a gradient.
        old_values: [B, R], at the start of the step.
        returns: [B, R], from `advantages.gae`.
        mask: [B, R].
        clip: the largest move of a value that still lowers the loss.
        denominator: global token count.

    Returns:
        (loss, stats): a scalar, and detached `clip_fraction`, the token mean of (the clipped error is the larger).

    Source: Schulman et al. 2016, section 5, in the clipped form of OpenAI's baselines and lm-human-preferences
    (Huang et al. 2022, "The 37 implementation details of PPO", detail 9).
    """
    new, old = zero_masked(values, mask), zero_masked(old_values.detach(), mask)
    target = zero_masked(returns.detach(), mask)
    # Not old + clamp(new - old): its rounding would make values inside the range look clipped.
    limited = new.clamp(old - clip, old + clip)
    unclipped, clipped = (new - target).square(), (limited - target).square()
    stats = {"clip_fraction": masked_mean((clipped > unclipped).detach(), mask, denominator)}
    return 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask, denominator), stats


def ranking_loss(scores: Tensor, ranks: Tensor, prompts: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Compute the reward model's K-wise ranking loss.

    loss = mean over prompts of -1/|P| * sum_{(w, l) in P} log sigmoid(score_w - score_l)

    where P holds a prompt's pairs with different ranks, the better first: C(K, 2) pairs without ties. Tied pairs are
    dropped, and so are prompts without any pair. No pairs at all give 0, attached to the graph.

    Args:
        scores: [N].
        ranks: [N], 1 is best; compared within a prompt only.
        prompts: [N], integers that say which responses share a prompt, in any order. All responses of a prompt
            belong in one call: pairs across shards would be lost.
        denominator: the number of prompts with pairs in the global minibatch; the own number when None.

    Returns:
        A scalar.

    Source: Ouyang et al. 2022 (arXiv 2203.02155), eq. 1.
    """
    if not (scores.dim() == 1 and scores.shape == ranks.shape == prompts.shape):
        shapes = tuple(scores.shape), tuple(ranks.shape), tuple(prompts.shape)
        raise ValueError(f"expected scores, ranks and prompts of one shape [N], found {shapes}")
    scores = at_least_float32(scores)
    same_prompt = prompts.unsqueeze(1) == prompts.unsqueeze(0)
    better = same_prompt & (ranks.unsqueeze(1) < ranks.unsqueeze(0))
    winner, loser = better.nonzero(as_tuple=True)
    pairs_of_response = better.sum(1)
    pairs_of_prompt = (same_prompt * pairs_of_response).sum(1)  # [N]: at each response, |P| of its prompt
    losses = -F.logsigmoid(scores[winner] - scores[loser]) / pairs_of_prompt[winner]
    if denominator is None:
        is_first = ~same_prompt.tril(-1).any(1)  # one response stands for its prompt
        denominator = (is_first & (pairs_of_prompt > 0)).sum()
    return divide(losses.sum(), denominator)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Compute the loss of direct preference optimisation.

    loss = -mean_b log sigmoid(beta * ((policy_chosen_b - ref_chosen_b) - (policy_rejected_b - ref_rejected_b)))

    A policy equal to its reference loses log 2. No pairs give 0, attached to the graph. A pair's implicit reward is
    beta * (policy - ref) of either response.

    Args:
        policy_chosen: [B], the log-prob of the chosen response, summed over its tokens; gets a gradient.
        policy_rejected: [B], likewise of the rejected response.
        ref_chosen: [B], of the reference.
        ref_rejected: [B].
        beta: the strength of the pull to the reference.
        denominator: the number of pairs in the global minibatch; the own number when None.

    Returns:
        A scalar.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
    """
    shapes = [tuple(x.shape) for x in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)]
    if policy_chosen.dim() != 1 or len(set(shapes)) > 1:
        raise ValueError(f"expected log-probs of one shape [B], summed over the response; found {shapes}")
    chosen = at_least_float32(policy_chosen) - at_least_float32(ref_chosen.detach())
    rejected = at_least_float32(policy_rejected) - at_least_float32(ref_rejected.detach())
    losses = -F.logsigmoid(beta * (chosen - rejected))
    return divide(losses.sum(), losses.numel() if denominator is None else denominator)


def lm_loss(logprobs: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Compute the language-modelling loss: -mean_t logprobs_t over valid tokens (SFT, pretraining, the ptx term).

    Args:
        logprobs: [B, R], of the target tokens.
        mask: [B, R].
        denominator: global token count.

    Returns:
        A scalar.

    Source: Ouyang et al. 2022 (arXiv 2203.02155), the last term of eq. 2, without its coefficient.
    """
    return -masked_mean(logprobs, mask, denominator)
