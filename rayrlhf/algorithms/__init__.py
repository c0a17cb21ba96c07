"""The mathematics of RLHF: pure functions, tensors in and tensors out; torch only, no I/O, no processes.

In the order of a PPO step: `kl` (per-token estimates, coefficient controllers), `ensembles` (one score from several
reward models), `rewards` (where KL enters the reward), `advantages`, `masking` (whitening; masked statistics for
all), `losses`. Before it: `acquisition` (which comparisons to ask a human for).

Legend of shapes: B sequences, R response positions, N responses, M members of an ensemble. Masks are bool, True at
valid tokens; masked positions may hold anything and come out as 0.
"""

from __future__ import annotations

from rayrlhf.algorithms.acquisition import bald, disagreement, margin
from rayrlhf.algorithms.advantages import gae, group_relative, leave_one_out
from rayrlhf.algorithms.ensembles import combine
from rayrlhf.algorithms.kl import AdaptiveKL, FixedKL, kl_estimate
from rayrlhf.algorithms.losses import (
    dpo_loss,
    lm_loss,
    ppo_policy_loss,
    ppo_value_loss,
    ranking_loss,
    truncated_importance_weights,
)
from rayrlhf.algorithms.masking import masked_mean, masked_moments, masked_var, masked_whiten, whiten_with_moments
from rayrlhf.algorithms.rewards import token_rewards, treat_truncated

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "bald",
    "combine",
    "disagreement",
    "dpo_loss",
    "gae",
    "group_relative",
    "kl_estimate",
    "leave_one_out",
    "lm_loss",
    "margin",
    "masked_mean",
    "masked_moments",
    "masked_var",
    "masked_whiten",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ranking_loss",
    "token_rewards",
    "treat_truncated",
    "truncated_importance_weights",
    "whiten_with_moments",
]
