"""Advantage estimators. Shapes: B sequences, R response positions."""

from __future__ import annotations

import torch
from torch import Tensor

from rayrlhf.algorithms.masking import zero_masked

__all__ = ["gae"]


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
