"""Learning rates by step."""

from __future__ import annotations

import math

__all__ = ["cosine_with_warmup", "linear_warmup"]


def cosine_with_warmup(step: int, total: int, peak: float, warmup: int, final_ratio: float) -> float:
    """Rises linearly to `peak` over `warmup` steps, then falls on a cosine to `final_ratio * peak` at the last step.

    Args:
        step: counted from 0.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def linear_warmup(step: int, peak: float, warmup: int, start_ratio: float = 0.1) -> float:
    """From `start_ratio * peak` to `peak` over `warmup` steps, then constant (Ouyang et al. 2022, appendix C.4)."""
    if step >= warmup:
        return peak
    return peak * (start_ratio + (1 - start_ratio) * step / warmup)
