"""The mathematics of RLHF: pure functions, tensors in and tensors out; torch only, no I/O, no processes.

In the order of a PPO step: `kl` (per-token estimates, coefficient controllers), `rewards` (where KL enters the
reward), `advantages`, `masking` (whitening; masked statistics for all), `losses`.

Legend of shapes: B sequences, R response positions, N responses. Masks are bool, True at valid tokens; masked
positions may hold anything and come out as 0.
"""

from __future__ import annotations

from rayrlhf.algorithms.advantages import gae
from rayrlhf.algorithms.kl import AdaptiveKL, FixedKL, kl_estimate
from rayrlhf.algorithms.losses import lm_loss, ppo_policy_loss, ppo_value_loss, ranking_loss
from rayrlhf.algorithms.masking import masked_mean, masked_moments, masked_var, masked_whiten, whiten_with_moments
from rayrlhf.algorithms.rewards import token_rewards

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "gae",
    "kl_estimate",
    "lm_loss",
    "masked_mean",
    "masked_moments",
    "masked_var",
    "masked_whiten",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ranking_loss",
    "token_rewards",
    "whiten_with_moments",
]
