"""Masked statistics: means, moments and whitening over the valid tokens of padded batches.

Shapes: `x` and `mask` agree (any shape, usually [B, R]: sequences, response positions); `mask` is bool, True at
valid tokens. Padding may hold anything, NaN and infinity included: it is replaced by 0 *before* any arithmetic,
because 0 * NaN is NaN both in a masked sum and in its gradient.

Results are float32 (float64 for float64 input; half precision is raised to float32).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "at_least_float32",
    "divide",
    "masked_mean",
    "masked_moments",
    "masked_var",
    "masked_whiten",
    "whiten_with_moments",
    "zero_masked",
]

VARIANCE_EPSILON = 1e-8
"""Added to a variance before its root is divided by: that of `whiten` in OpenAI's lm-human-preferences."""


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or as it is when float64: y_i = x_i, any shape. Half precision loses too much of a sum."""
    return x if x.dtype == torch.float64 else x.float()


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` at valid tokens and 0 elsewhere, in at least float32: the first step of every masked function here.

    y_i = x_i if mask_i else 0; the gradient at a masked position is exactly 0. Shapes: x, mask, result all alike.
    Source: the JAX FAQ, "Gradients contain NaN where using where": the guard belongs on the input of the arithmetic.

    Raises:
        ValueError: the mask is not bool or its shape is not that of `x`; broadcasting here would miscount tokens.
    """
    if mask.dtype != torch.bool or mask.shape != x.shape:
        raise ValueError(
            f"expected a bool mask of shape {tuple(x.shape)}, found {mask.dtype} of shape {tuple(mask.shape)}"
        )
    real = at_least_float32(x)
    return torch.where(mask, real, torch.zeros_like(real))


def divide(total: Tensor, denominator: float | Tensor) -> Tensor:
    """Return total / denominator (scalars), and total where the denominator is 0, for then the total is empty.

    The denominator is only replaced at 0, not clamped to 1: a caller may fold a scale into it (tokens divided by
    ranks, to undo DeepSpeed's averaging). Source: Huang et al. 2024 (arXiv 2403.17031).
    """
    count = torch.as_tensor(denominator, device=total.device).to(total.dtype)
    return total / torch.where(count == 0, torch.ones_like(count), count)


def masked_mean(x: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Return sum_i mask_i x_i / denominator, a scalar; 0 for an empty mask, still attached to the graph.

    Args:
        x: values, any shape.
        mask: bool, as `x`.
        denominator: the token count of the global minibatch, so that the results of its shards add up to that of
            the whole; the own mask's count when None.

    Source: Huang et al. 2024 (arXiv 2403.17031), "The N+ Implementation Details of RLHF with PPO".
    """
    return divide(zero_masked(x, mask).sum(), mask.sum() if denominator is None else denominator)


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum_i mask_i, sum_i mask_i x_i, sum_i mask_i x_i^2): three float64 scalars, to be all-reduced by sum.

    Float64, because variance from moments subtracts two nearly equal numbers when |mean| >> std: in float32 all is
    lost at a mean of 3,000 std. The square of a float32 is exact in float64 and the sum errs by some 1e-16, so the
    variance keeps a relative error near 1e-16 (mean / std)^2: 1e-8 at a mean of 10,000 std, and useful up to the
    point where float32 itself can no longer tell the values apart. This way needs one pass and one all-reduce of
    three numbers (merging per-shard means, the other sound way, is not a sum). The count is float64 too, so
    that the three can be stacked.

    Shapes: x, mask alike; three scalars. Source: the "textbook" algorithm of Chan et al. 1983.
    """
    kept = zero_masked(x, mask).double()
    return mask.sum().double(), kept.sum(), kept.square().sum()


def _mean_and_var(count: Tensor, total: Tensor, total_squares: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Return the mean and variance (float64 scalars) that moments stand for; (0, 0) when they are of no values."""
    tokens = count.double().clamp(min=1)
    mean = total.double() / tokens
    # Rounding can leave a constant's variance just below 0, and rsqrt would then give NaN.
    variance = (total_squares.double() / tokens - mean.square()).clamp(min=0)
    if unbiased:
        variance = variance * tokens / (tokens - 1).clamp(min=1)  # a single token has variance 0, not 0 / 0
    return mean, variance


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = False) -> Tensor:
    """Return sum_i mask_i (x_i - mean)^2 / n, a scalar; over n - 1 if `unbiased`; 0 for fewer than two tokens.

    Shapes: x, mask alike; a scalar. Source: Chan, Golub & LeVeque 1983, "Algorithms for
    computing the sample variance"; computed from `masked_moments`.
    """
    _, variance = _mean_and_var(*masked_moments(x, mask), unbiased=unbiased)
    return variance if x.dtype == torch.float64 else variance.float()


def whiten_with_moments(
    x: Tensor,
    mask: Tensor,
    count: Tensor,
    total: Tensor,
    total_squares: Tensor,
    shift_mean: bool = True,
    unbiased: bool = False,
) -> Tensor:
    """Whiten `x` by moments that may cover more than `x`, such as those of all ranks; masked positions give 0.

    y_i = (x_i - mean) / sqrt(variance + 1e-8), plus the mean if not `shift_mean`.

    Args:
        x: values, any shape.
        mask: bool, as `x`.
        count: scalar, the number of values; like the next two from `masked_moments`, summed over ranks.
        total: scalar, their sum.
        total_squares: scalar, the sum of their squares.
        shift_mean: False keeps the mean and only scales the deviations from it (as for rewards).
        unbiased: divide the variance by n - 1.

    A variance of 0 gives 0 (or the mean), not NaN. Source: `whiten` in Ziegler et al. 2019's lm-human-preferences.
    """
    mean, variance = _mean_and_var(count, total, total_squares, unbiased)
    kept = zero_masked(x, mask)
    # The subtraction stays in float64: rounding the mean first would shift every token alike.
    white = (kept.double() - mean) * torch.rsqrt(variance + VARIANCE_EPSILON)
    if not shift_mean:
        white = white + mean
    return zero_masked(white.to(kept.dtype), mask)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, unbiased: bool = False) -> Tensor:
    """Whiten `x` by its own moments: y_i = (x_i - mean) / sqrt(variance + 1e-8); masked positions give 0.

    `whiten_with_moments` for one process. Shapes: x, mask, result alike. Source: `whiten` in Ziegler et al. 2019's
    lm-human-preferences.
    """
    return whiten_with_moments(x, mask, *masked_moments(x, mask), shift_mean=shift_mean, unbiased=unbiased)
