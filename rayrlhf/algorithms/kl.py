"""KL divergence: estimators from sampled tokens, and the controllers of its coefficient.

Shapes: B sequences, R response positions. Estimates are per token; what is reported and controlled is their sum
over a response, averaged over responses (nats per response).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rayrlhf.algorithms.masking import at_least_float32
from rayrlhf.errors import TrainingError

__all__ = ["AdaptiveKL", "FixedKL", "kl_estimate"]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are held to this before `exp`: e^20 is 5e8, so float32 sums and squares of ratios stay finite."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: Literal["k1", "k2", "k3"] = "k1") -> Tensor:
    """Estimate KL(policy || reference) at each token, from tokens that the policy sampled.

    With d = logprobs - ref_logprobs:
        k1 = d                  unbiased, may be negative; the penalty of InstructGPT (eq. 2)
        k2 = d^2 / 2            biased, never negative
        k3 = exp(-d) - 1 + d    unbiased, never negative

    In k3, d is held to at least -20 (`LOG_RATIO_LIMIT`) in both places, so exp cannot overflow and k3 stays
    non-negative; such a token gives e^20 - 21 and no gradient. Large positive d needs no limit, nor do k1 and k2.

    Elementwise and without a mask: padding that holds NaN gives NaN there, to be dropped by a masked function. To
    train through k2 or k3, pass both inputs through `masking.zero_masked` first.

    Args:
        logprobs: [B, R], of the policy.
        ref_logprobs: [B, R], of the reference.
        kind: which estimator.

    Returns:
        [B, R], nats per token.

    Source: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = at_least_float32(logprobs) - at_least_float32(ref_logprobs)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        limited = log_ratio.clamp(min=-LOG_RATIO_LIMIT)
        return torch.expm1(-limited) + limited  # expm1: near 0 the terms cancel to d^2 / 2
    raise ValueError(f"unknown KL estimator {kind!r}; expected 'k1', 'k2' or 'k3'")


class FixedKL:
    """A KL coefficient that stays: beta_{t+1} = beta_t. Source: Ouyang et al. 2022, appendix C.4 (0.02)."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, num_samples: int) -> None:
        """Do nothing; here so that a loop need not ask which controller it has."""


class AdaptiveKL:
    """A KL coefficient that steers the KL to a target, by a proportional controller in log space.

    e = clip(kl / target - 1, -0.2, 0.2);  beta_{t+1} = beta_t * (1 + e * num_samples / horizon)

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2, where num_samples / horizon is K_beta = 0.1.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        """Start at `coef`; `target` is in nats per response, `horizon` in samples."""
        if not (target > 0 and horizon > 0):
            raise ValueError(f"expected target > 0 and horizon > 0, found target={target}, horizon={horizon}")
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_samples: int) -> None:
        """Take one controller step. `kl`: measured, nats per response; `num_samples`: the responses it is over.

        Raises:
            TrainingError: the KL is not finite, or a step of more than 5 horizons would make the coefficient
                zero or negative, and so reward the divergence it should punish.
        """
        if not math.isfinite(kl):
            raise TrainingError(f"the KL given to AdaptiveKL is {kl}", "look for NaN in the log-probs of this step")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        factor = 1 + error * num_samples / self.horizon
        if factor <= 0:
            raise TrainingError(
                f"{num_samples} samples a step with horizon {self.horizon} would scale the KL coefficient by {factor}",
                "make the horizon several times the batch size",
            )
        self.coef *= factor
