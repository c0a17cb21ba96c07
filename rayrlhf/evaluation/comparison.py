"""Comparing arms on the same prompts: means and win rates with bootstrap intervals, lengths accounted for, variety.

Everything is paired by prompt: number i of every array belongs to prompt i. Shape legend: N prompts, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["best_of_n_kl", "distinct_n", "interval", "length_controlled_win_rate", "mean", "win_rate"]

Statistic = Callable[[np.ndarray], float]


def interval(statistic: Statistic, prompts: int, resamples: int, seed: int) -> list[float]:
    """The percentile bootstrap's 95 % interval of a statistic (Efron and Tibshirani 1993, chapter 13).

    Args:
        statistic: gets the numbers of N prompts drawn with replacement (int [N]), and computes its value of them.
        prompts: N.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, prompts, prompts)) for _ in range(resamples)]
    return [float(x) for x in np.percentile(values, [2.5, 97.5])]


def mean(values: Sequence[float] | np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """{value, ci95} of the mean of float [N]."""
    array = np.asarray(values, dtype=np.float64)
    ci95 = interval(lambda rows: float(array[rows].mean()), len(array), resamples, seed)
    return {"value": float(array.mean()), "ci95": ci95}


def win_rate(scores: Sequence[float], others: Sequence[float], resamples: int, seed: int) -> dict[str, Any]:
    """{value, ci95} of the share of prompts whose score is above the other arm's; ties count half.

    Scores closer than 1e-9 tie: sums of the same weights in another order are the same score.
    """
    return mean(_won(scores, others), resamples, seed)


def length_controlled_win_rate(
    scores: Sequence[float],
    others: Sequence[float],
    lengths: Sequence[float],
    other_lengths: Sequence[float],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """{value, ci95} of the win rate that would be left if both arms' responses were equally long.

    A logistic regression of winning on tanh(length difference / its standard deviation), read at difference 0: the
    length term of Dubois et al. 2024 (arXiv 2404.04475, section 3), without their term for how hard a prompt is.
    """
    won = _won(scores, others)
    difference = np.asarray(lengths, dtype=np.float64) - np.asarray(other_lengths, dtype=np.float64)
    spread = float(difference.std()) or 1.0
    term = np.tanh(difference / spread)

    def at_equal_length(rows: np.ndarray) -> float:
        return _sigmoid(_logistic_fit(term[rows], won[rows])[0])

    everything = np.arange(len(won))
    # Each resample is a fit of its own: fewer of them than for a mean.
    ci95 = interval(at_equal_length, len(won), max(100, resamples // 10), seed)
    return {"value": at_equal_length(everything), "ci95": ci95}


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of different n-grams of words among all of them (Li et al. 2016, arXiv 1510.03055); 1 where there are none.

    It falls with the amount of text, so only compare arms on the same prompts.
    """
    grams = [tuple(words[i : i + n]) for text in texts for words in [text.split()] for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def best_of_n_kl(n: int) -> float:
    """Upper bound, in nats, of the KL of best-of-n sampling to its model: log n - (n - 1) / n.

    Stiennon et al. 2020 (arXiv 2009.01325), appendix G.3; a bound by Beirami et al. 2024 (arXiv 2401.01879).
    """
    return float(np.log(n) - (n - 1) / n)


def _won(scores: Sequence[float], others: Sequence[float]) -> np.ndarray:
    """float64 [N]: 1 where the score is higher, 1/2 where they tie, else 0."""
    difference = np.asarray(scores, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    won: np.ndarray = 0.5 + 0.5 * np.where(np.abs(difference) < 1e-9, 0.0, np.sign(difference))
    return won


def _sigmoid(x: float) -> float:
    return float(1.0 / (1.0 + np.exp(-x)))


def _logistic_fit(term: np.ndarray, won: np.ndarray) -> tuple[float, float]:
    """(intercept, slope) by Newton's method; a whisper of ridge keeps a perfect separation finite."""
    features = np.stack([np.ones_like(term), term], axis=1)
    weights = np.zeros(2)
    for _ in range(25):
        p = 1.0 / (1.0 + np.exp(-features @ weights))
        gradient = features.T @ (won - p) - 1e-3 * weights
        hessian = (features * (p * (1 - p))[:, None]).T @ features + 1e-3 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        weights += step
        if np.abs(step).max() < 1e-9:
            break
    return float(weights[0]), float(weights[1])
