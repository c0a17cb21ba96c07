"""Advantage estimators: per token from a value model (GAE), or per response from its group (GRPO, RLOO).

Shapes: B sequences, R response positions, N responses. A group holds the responses to one prompt; its label is any
integer, and the members of groups may come in any order, interleaved. All of a group belongs in one call: a part of
it on another rank would have another mean. What an estimator for groups returns is the advantage of every token of
the response, and no value model is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rayrlhf.algorithms.masking import VARIANCE_EPSILON, at_least_float32, zero_masked

__all__ = ["ESTIMATORS", "Estimator", "gae", "group_relative", "leave_one_out"]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Estimate generalised advantages and the returns that a value model is trained on.

    delta_t = r_t + gamma * V_{t+1} - V_t,    A_t = delta_t + gamma * lam * A_{t+1},    returns_t = A_t + V_t

    An episode ends with its response: V and A are 0 after the last valid token, whatever the padding holds.

    Args:
        rewards: [B, R], from `rewards.token_rewards`.
        values: [B, R], V_t, the value before the token at t is sampled.
        mask: [B, R], bool, True at valid tokens: one run of them per row, padding on the right.
        gamma: discount.
        lam: 0 gives the one-step TD error, 1 the return minus the value.

    Returns:
        (advantages, returns), [B, R] each, 0 at masked positions. Both are targets and carry no gradient.

    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16, in its recursive form.
    """
    rewards, values = zero_masked(rewards.detach(), mask), zero_masked(values.detach(), mask)
    next_values = torch.zeros_like(values)
    next_values[:, :-1] = values[:, 1:]
    deltas = zero_masked(rewards + gamma * next_values - values, mask)
    advantages = torch.zeros_like(deltas)
    advantage = deltas.new_zeros(deltas.shape[0])
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage  # padding on the right has delta 0 and keeps this at 0
        advantages[:, t] = advantage
    advantages = zero_masked(advantages, mask)
    return advantages, advantages + values


def group_relative(scores: Tensor, groups: Tensor, normalize_std: bool = True) -> Tensor:
    """Compare each response with its group: its deviation from the group's mean, in standard deviations.

    A_i = (s_i - mean_g) / sqrt(variance_g + 1e-8),    or A_i = s_i - mean_g without `normalize_std`

    over the group g of response i. A group of one, or one whose scores are all equal, gives exactly 0. Deviations far
    below 1e-4, such as a scorer's rounding, stay small: the epsilon is that of `masking.masked_whiten`.

    The variance is the population's (over n, not n - 1), as in `masked_whiten`: the group is all that is compared,
    not a sample from which to infer, and every group then has mean square 1, whatever its size. The paper writes
    "std" and leaves it open; TRL and verl divide by the sample's, which makes a group of n smaller by
    sqrt((n - 1) / n): 0.71 for 2 responses, 0.94 for 8.

    Args:
        scores: [N], one per response.
        groups: [N], integer labels.
        normalize_std: False only centres; dividing favours prompts that are almost always or never solved (Liu et
            al. 2025, arXiv 2503.20783).

    Returns:
        [N], without gradient.

    Source: Shao et al. 2024 (arXiv 2402.03300), section 4.1.2, the advantage in eq. 3.
    """
    deviations, members, sizes = _group_deviations(scores, groups)
    if normalize_std:
        variances = torch.zeros_like(sizes).index_add(0, members, deviations.square()) / sizes
        deviations = deviations * torch.rsqrt(variances + VARIANCE_EPSILON)[members]
    return deviations.to(at_least_float32(scores).dtype)


def leave_one_out(scores: Tensor, groups: Tensor) -> Tensor:
    """Compare each response with the mean of the others of its group, a baseline independent of the response.

    A_i = s_i - 1/(n - 1) * sum_{j != i} s_j  =  n/(n - 1) * (s_i - mean_g),    j and the mean over i's group of n

    A group of one has no others, hence no baseline: it gives 0 and so trains nothing, rather than its raw score.

    Args:
        scores: [N], one per response. In the paper the KL penalty of the whole response is in it: score - beta * KL.
        groups: [N], integer labels.

    Returns:
        [N], without gradient.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), "REINFORCE Leave-One-Out"; the estimator is that of Kool et al.
    2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    """
    deviations, members, sizes = _group_deviations(scores, groups)
    advantages = deviations * (sizes / (sizes - 1).clamp(min=1))[members]
    return advantages.to(at_least_float32(scores).dtype)


def _group_deviations(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (deviations [N], members [N], sizes [groups]): s_i - mean_g, the index of i's group, responses in each.

    In float64. Scores count from the lowest of their group, so that equal ones deviate by exactly 0, not by rounding.
    """
    if scores.dim() != 1 or scores.shape != groups.shape:
        shapes = tuple(scores.shape), tuple(groups.shape)
        raise ValueError(f"expected scores and groups of one shape [N], found {shapes}")
    if groups.is_floating_point() or groups.is_complex():
        raise ValueError(f"expected integer labels of groups, found {groups.dtype}")
    labels, members = torch.unique(groups, return_inverse=True)
    real, none = scores.detach().double(), scores.new_zeros(len(labels), dtype=torch.float64)
    sizes = none.index_add(0, members, torch.ones_like(real))
    heights = real - none.scatter_reduce(0, members, real, "amin", include_self=False)[members]
    means = none.index_add(0, members, heights) / sizes
    return heights - means[members], members, sizes


@dataclass(frozen=True, slots=True)
class Estimator:
    """An advantage estimator as a PPO step uses it. `ppo.advantage` names one of `ESTIMATORS`.

    Exactly one of the two functions is set. `of_tokens(rewards[B,R], values[B,R], mask[B,R], gamma, lam)` returns
    (advantages, returns) and needs a value model; its advantages are whitened over the step. `of_responses(scores[N],
    groups[N])` compares responses to one prompt, `scores` being each one's summed token rewards, KL penalty included;
    all tokens of a response get its advantage, as it is.
    """

    of_tokens: Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]] | None = None
    of_responses: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def needs_values(self) -> bool:
        return self.of_tokens is not None


ESTIMATORS = {
    "gae": Estimator(of_tokens=gae),
    "group_relative": Estimator(of_responses=group_relative),
    "leave_one_out": Estimator(of_responses=leave_one_out),
}
