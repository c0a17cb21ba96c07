"""One score from several reward models, the less trusted the more they disagree. Shapes: M members, B responses."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rayrlhf.algorithms.masking import at_least_float32

__all__ = ["combine"]


def combine(scores: Tensor, how: Literal["mean", "min", "uwo"] = "mean", weight: float = 0.5) -> Tensor:
    """Combine the scores that the members of an ensemble give to each response.

    mean:  mean_m s_mb
    min:   min_m s_mb                               the worst case
    uwo:   mean_m s_mb - weight * variance_m s_mb   uncertainty-weighted

    The variance is the population's (over M, not M - 1): one member has variance 0. Mean and variance are computed in
    float64, about the mean, so members that agree exactly lose nothing.

    Args:
        scores: [M, B], on one scale: normalise each member first, or the largest scale decides.
        how: which combination.
        weight: lambda, of `uwo` only; the paper takes 0.5 for best-of-n and 0.1 for PPO.

    Returns:
        [B].

    Source: Coste et al. 2023 (arXiv 2310.02743), section 3: mean, worst-case (WCO) and uncertainty-weighted (UWO)
    optimisation.
    """
    if scores.dim() != 2 or scores.shape[0] == 0:
        raise ValueError(f"expected scores of shape [M, B] with at least one member, found {tuple(scores.shape)}")
    real = at_least_float32(scores)
    if how == "min":
        return real.amin(0)
    if how not in ("mean", "uwo"):
        raise ValueError(f"unknown combination {how!r}; expected 'mean', 'min' or 'uwo'")
    combined = real.double().mean(0)
    if how == "uwo":
        combined = combined - weight * (real.double() - combined).square().mean(0)
    return combined.to(real.dtype)
