"""Response lengths as the plan draws them: log-normal, cut at the longest, by quantiles and not by chance."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["response_lengths"]

GOLDEN = (math.sqrt(5) - 1) / 2


def response_lengths(count: int, mean: float, longest: float, spread: float) -> list[float]:
    """`count` lengths with this mean whose logarithms have this standard deviation, none over `longest`.

    They come in an order without a pattern: neighbours are of all lengths, as prompts of a batch are.
    """
    if spread == 0 or mean >= longest:
        return [min(mean, longest)] * count
    normal = NormalDist()
    shapes = [math.exp(spread * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    low, high = 0.0, longest / min(shapes)
    for _ in range(60):  # the mean after the cut grows with the scale
        scale = (low + high) / 2
        if sum(min(longest, scale * shape) for shape in shapes) < mean * count:
            low = scale
        else:
            high = scale
    order = sorted(range(count), key=lambda i: (i * GOLDEN) % 1.0)
    return [max(1.0, min(longest, high * shapes[i])) for i in order]
