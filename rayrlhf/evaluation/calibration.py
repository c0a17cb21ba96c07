"""How a reward model's scores agree with the people who ranked: accuracy, calibration, and the part of length in it.

Everything is counted over pairs of responses to one prompt, first and second in the order in which their record lists
them; that order has nothing to do with which is better. A tie in rank is no pair. Shape legend: N pairs of one source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from rayrlhf.data.prompts import RankingExample

__all__ = ["accuracy_by_k", "expected_calibration_error", "length_bias", "pair_accuracy"]

CONFIDENCE_BINS = 10


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Differences are the first response's number less the second's."""

    scores: np.ndarray
    """float64 [N]: raw score differences, log-odds that the first is preferred"""
    chars: np.ndarray
    """float64 [N]: length differences in characters"""
    labels: np.ndarray
    """float64 [N]: 1 where people ranked the first better, -1 where the second"""
    responses: np.ndarray
    """int64 [N]: how many responses the pair's ranking has (K)"""


def pair_accuracy(examples: Sequence[RankingExample], scores: Sequence[Sequence[float]]) -> dict[str, dict[str, Any]]:
    """How well scores rank the responses, per source; never pooled, since one source's rule may be another's trap.

    Args:
        examples: rankings; their lengths are the characters of the responses as written.
        scores: for each example its K scores as the ranking loss trained them, before any normalisation: a difference
            of two is the log-odds that the first is preferred (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1).

    Returns:
        source -> a row; a source of nothing but ties has none. NaN is what too few pairs cannot say.
            pairs: N.
            accuracy: share of pairs whose better response scores higher; equal scores count half.
            longer_wins: the accuracy of "the longer one is better"; equal lengths count half.
            ece: `expected_calibration_error`.
            length_bias, length_bias_of_labels: `length_bias` of the scores, and of the people on the same pairs.
            accuracy_by_k: `accuracy_by_k`.
    """
    return {source: _row(pairs) for source, pairs in sorted(_by_source(examples, scores).items())}


def expected_calibration_error(score_differences: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error of p = sigmoid(first score - second score) (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    The prediction is the response that p favours, its confidence max(p, 1 - p), and it is right where people prefer
    that response too; p = 1/2 is half right. Pairs go into 10 bins of equal width over [1/2, 1], closed on the right,
    since the confidence in one of two is never below 1/2. The ECE is the mean over pairs of their bin's
    |accuracy - confidence|. Which response is listed first does not change it. A bin's accuracy is noisy, so few
    pairs (below some hundreds) raise the ECE of even a perfect model.

    Args:
        score_differences: float [N], log-odds that the first response is preferred.
        labels: float [N], 1 where people prefer the first, -1 the second.

    Returns:
        A probability in [0, 1]; NaN without pairs, or where a difference is NaN.
    """
    if not len(score_differences) or np.isnan(score_differences).any():
        return float("nan")
    confidence = 1.0 / (1.0 + np.exp(-np.abs(score_differences)))
    bins = np.ceil((confidence - 0.5) * 2 * CONFIDENCE_BINS).astype(np.int64) - 1
    # A bin's share of the pairs times its |accuracy - confidence| is its |sum of (right - confidence)| / N.
    gaps = np.bincount(np.maximum(bins, 0), weights=_won(score_differences, labels) - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def length_bias(preferences: np.ndarray, length_differences: np.ndarray) -> float:
    """Kendall's tau-b between preference and length, over pairs within a prompt (Kendall 1945, Biometrika 33).

    (pairs whose longer response is preferred - pairs whose shorter one is) / sqrt(pairs with a preference * pairs of
    unequal length): 1 when longer is always preferred, 0 when length says nothing. Only signs count, so that scores
    (which have a size) and people (who only choose) are on one scale: a model that chooses as they do has their
    length bias, and more than theirs is what a policy will exploit (Singhal et al. 2023, arXiv 2310.03716). Which
    response is listed first does not change it.

    Args:
        preferences: float [N], positive where the first response is preferred, 0 where neither is.
        length_differences: float [N], first less second, in any unit.

    Returns:
        In [-1, 1]; NaN for fewer than two pairs, and where there is no preference or no difference in length at all.
    """
    decided, unequal = np.count_nonzero(preferences), np.count_nonzero(length_differences)
    if len(preferences) < 2 or not decided or not unequal:
        return float("nan")
    agreement = np.sign(preferences) @ np.sign(length_differences)
    return float(agreement / np.sqrt(float(decided) * float(unequal)))


def accuracy_by_k(won: np.ndarray, responses: np.ndarray) -> dict[int, dict[str, float]]:
    """Accuracy apart for each K, the number of responses that were ranked at once.

    Args:
        won: float [N], 1 where the scores order the pair as people do, 1/2 where they are equal, else 0.
        responses: int [N], the K of the ranking that the pair is from.

    Returns:
        K -> {pairs, accuracy}, smallest K first.
    """
    rows = {int(k): won[responses == k] for k in np.unique(responses)}
    return {k: {"pairs": len(row), "accuracy": float(row.mean())} for k, row in rows.items()}


def _by_source(examples: Sequence[RankingExample], scores: Sequence[Sequence[float]]) -> dict[str, _Pairs]:
    table: dict[str, list[tuple[float, int, int, int]]] = {}
    for example, score in zip(examples, scores, strict=True):
        ranks, chars = example.ranks, example.response_chars
        for a, b in combinations(range(len(ranks)), 2):
            if ranks[a] != ranks[b]:
                label = 1 if ranks[a] < ranks[b] else -1
                pair = (score[a] - score[b], chars[a] - chars[b], label, len(ranks))
                table.setdefault(example.source, []).append(pair)
    columns = {source: np.array(rows, dtype=np.float64).T for source, rows in table.items()}
    return {source: _Pairs(s, c, label, k.astype(np.int64)) for source, (s, c, label, k) in columns.items()}


def _row(pairs: _Pairs) -> dict[str, Any]:
    won = _won(pairs.scores, pairs.labels)
    return {
        "pairs": len(won),
        "accuracy": float(won.mean()),
        "longer_wins": float(_won(pairs.chars, pairs.labels).mean()),
        "ece": expected_calibration_error(pairs.scores, pairs.labels),
        "length_bias": length_bias(pairs.scores, pairs.chars),
        "length_bias_of_labels": length_bias(pairs.labels, pairs.chars),
        "accuracy_by_k": accuracy_by_k(won, pairs.responses),
    }


def _won(differences: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float64 [N]: 1 where the greater number is at the preferred response, 1/2 where they are equal, else 0."""
    won: np.ndarray = 0.5 + 0.5 * np.sign(differences) * labels
    return won
