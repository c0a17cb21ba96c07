"""How the scores of the answers are spread, an arm at a time (Touvron et al. 2023, Llama 2, figure 20)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["spread"]

GRID = 120
"""Points at which a density is drawn."""
FEW_VALUES = 24
"""A judge that knows no more scores than this is shown as shares: smoothing would invent what lies between."""


def spread(scores: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """The distributions of several arms on one axis.

    Args:
        scores: arm -> its scores, one an answer.

    Returns:
        {"kind": "shares" | "density", "x": [...], "arms": {arm: [...]}, "means": {arm: mean}}: shares of the values x,
        or the kernel density at x. None where no arm has two scores.
    """
    arms = {arm: np.asarray(values, dtype=np.float64) for arm, values in scores.items() if len(values) > 1}
    if not arms:
        return None
    values = np.unique(np.round(np.concatenate(list(arms.values())), 6))
    means = {arm: float(sample.mean()) for arm, sample in arms.items()}
    if len(values) <= FEW_VALUES:
        shares = {arm: [float(np.isclose(sample, v).mean()) for v in values] for arm, sample in arms.items()}
        return {"kind": "shares", "x": values.tolist(), "arms": shares, "means": means}
    widths = {arm: _bandwidth(sample) for arm, sample in arms.items()}
    margin = 3 * max(widths.values())
    x = np.linspace(values[0] - margin, values[-1] + margin, GRID)
    curves = {arm: _density(sample, x, widths[arm]) for arm, sample in arms.items()}
    return {"kind": "density", "x": _short(x), "arms": {a: _short(c) for a, c in curves.items()}, "means": means}


def _bandwidth(sample: np.ndarray) -> float:
    """Silverman 1986, eq. 3.31: 0.9 min(deviation, interquartile range / 1.34) N^(-1/5)."""
    low, high = np.percentile(sample, (25, 75))
    sizes = [size for size in (float(sample.std(ddof=1)), float(high - low) / 1.34) if size > 0]
    shrink: float = len(sample) ** -0.2
    return 0.9 * min(sizes, default=1e-3) * shrink


def _density(sample: np.ndarray, x: np.ndarray, width: float) -> np.ndarray:
    """float64 [GRID]: the mean of Gaussians around the scores."""
    distances = (x[:, None] - sample[None, :]) / width
    density: np.ndarray = np.exp(-0.5 * distances**2).mean(axis=1) / (width * np.sqrt(2 * np.pi))
    return density


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
