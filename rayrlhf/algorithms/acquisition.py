"""Which comparisons to ask a human for: higher is more informative.

Shapes: M members of an ensemble, N candidate pairs. `probs` are probabilities that the first response of a pair is
preferred. Always compare with a random choice: Gleave & Irving 2022 (arXiv 2203.07472) found that disagreement
between fine-tunes of one base model did not beat it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayrlhf.algorithms.masking import at_least_float32

__all__ = ["bald", "disagreement", "margin"]


def margin(probs: Tensor) -> Tensor:
    """Score by closeness to a coin toss: -|p - 0.5|, from -0.5 (certain) to 0.

    Args:
        probs: any shape, usually [N].

    Returns:
        As `probs`.

    Source: uncertainty sampling, Lewis & Gale 1994 (arXiv cmp-lg/9407020), for two classes.
    """
    return -(_checked(probs) - 0.5).abs().to(at_least_float32(probs).dtype)


def bald(probs: Tensor) -> Tensor:
    """Score by what the answer would tell about which member is right (BALD).

    H(mean_m p_mn) - mean_m H(p_mn),    H(p) = -p log p - (1 - p) log(1 - p) in nats, 0 log 0 = 0

    From 0 (members agree, be it that the pair is a coin toss) to log 2 (half are sure of one answer, half of the
    other). In float64, and held to at least 0, which rounding could miss.

    Args:
        probs: [M, N].

    Returns:
        [N].

    Source: Houlsby et al. 2011 (arXiv 1112.5745), eq. 2, with the ensemble in place of the posterior.
    """
    real = _checked(probs, members=True)
    information = _binary_entropy(real.mean(0)) - _binary_entropy(real).mean(0)
    return information.clamp(min=0).to(at_least_float32(probs).dtype)


def disagreement(probs: Tensor) -> Tensor:
    """Score by the population variance of the members' probabilities: mean_m (p_mn - mean_m p_mn)^2, 0 to 0.25.

    Args:
        probs: [M, N].

    Returns:
        [N]; 0 for one member.

    Source: Christiano et al. 2017 (arXiv 1706.03741), section 2.2.4.
    """
    real = _checked(probs, members=True)
    return (real - real.mean(0)).square().mean(0).to(at_least_float32(probs).dtype)


def _binary_entropy(probs: Tensor) -> Tensor:
    """Return H(p) in nats, elementwise, any shape; `xlogy` knows that 0 log 0 = 0."""
    return -torch.xlogy(probs, probs) - torch.xlogy(1 - probs, 1 - probs)


def _checked(probs: Tensor, members: bool = False) -> Tensor:
    """Return `probs` in float64, without gradient.

    Raises:
        ValueError: an entry is not in [0, 1] (a NaN would sort as the most informative of all), or the shape is not
            [M, N] with at least one member where `members` asks for it.
    """
    if members and (probs.dim() != 2 or probs.shape[0] == 0):
        raise ValueError(f"expected probs of shape [M, N] with at least one member, found {tuple(probs.shape)}")
    real = probs.detach().double()
    outside = ~((real >= 0) & (real <= 1))
    if outside.any():
        raise ValueError(f"expected probabilities in [0, 1], found {real[outside][0].item()}")
    return real
