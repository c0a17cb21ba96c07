"""Arms against each other on the same prompts."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from rayrlhf.evaluation.comparison import (
    best_of_n_kl,
    distinct_n,
    interval,
    length_controlled_win_rate,
    mean,
    win_rate,
)

# ---- intervals


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one_on_a_large_sample() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 2500)
    half = 1.96 * float(values.std()) / 50
    found = mean(values, resamples=4000, seed=0)
    assert found["value"] == pytest.approx(float(values.sum()) / 2500)
    assert found["ci95"] == pytest.approx([found["value"] - half, found["value"] + half], abs=0.1 * half)


def test_the_interval_of_a_win_rate_is_the_binomial_one_on_a_large_sample() -> None:
    """0.7 won of 1,600: 1.96 sqrt(0.7 x 0.3 / 1600) = 0.0225."""
    found = win_rate([1.0] * 1120 + [0.0] * 480, [0.5] * 1600, resamples=4000, seed=0)
    assert found["value"] == pytest.approx(0.7)
    assert found["ci95"] == pytest.approx([0.6775, 0.7225], abs=0.002)


def test_the_interval_is_of_any_statistic_and_is_the_same_for_the_same_seed() -> None:
    values = np.arange(100.0)

    def median(rows: np.ndarray) -> float:
        return float(np.median(values[rows]))

    low, high = interval(median, 100, 1000, seed=3)
    assert 35 < low < 49.5 < high < 65
    assert interval(median, 100, 1000, seed=3) == [low, high]
    assert interval(median, 100, 1000, seed=4) != [low, high]


def test_what_never_varies_has_an_interval_of_no_width() -> None:
    assert mean([2.5] * 7, resamples=100, seed=0) == {"value": 2.5, "ci95": [2.5, 2.5]}
    assert mean([4.0], resamples=100, seed=0) == {"value": 4.0, "ci95": [4.0, 4.0]}


# ---- win rates


def test_ties_count_half_in_a_win_rate() -> None:
    # won, lost, tied, won: (1 + 0 + 0.5 + 1) / 4
    assert win_rate([3.0, 1.0, 2.0, 0.0], [2.0, 2.0, 2.0, -1.0], resamples=100, seed=0)["value"] == 0.625


def test_scores_that_differ_by_their_order_of_summation_only_are_ties() -> None:
    one, other = 0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1
    assert one != other
    assert win_rate([one, 1.0], [other, 1.0 + 1e-6], resamples=100, seed=0)["value"] == 0.25


def test_an_arm_and_itself_win_half_with_certainty() -> None:
    scores = [0.1, 0.9, 0.4]
    assert win_rate(scores, scores, resamples=100, seed=0) == {"value": 0.5, "ci95": [0.5, 0.5]}


def test_the_win_rates_of_both_sides_add_up_to_1() -> None:
    rng = random.Random(2)
    a, b = ([rng.randrange(4) / 4 for _ in range(50)] for _ in range(2))
    assert win_rate(a, b, 100, 0)["value"] + win_rate(b, a, 100, 0)["value"] == pytest.approx(1.0)


# ---- with lengths accounted for


def test_the_length_controlled_win_rate_equals_the_win_rate_when_lengths_are_equal() -> None:
    scores = [1.0] * 130 + [0.5] * 40 + [0.0] * 30  # (130 + 20) / 200
    found = length_controlled_win_rate(scores, [0.5] * 200, [9] * 200, [9] * 200, resamples=1000, seed=0)
    plain = win_rate(scores, [0.5] * 200, resamples=1000, seed=0)
    assert found["value"] == pytest.approx(0.75, abs=1e-4)
    assert found["ci95"] == pytest.approx(plain["ci95"], abs=0.02)


def longer_by(difference: float, spread: float, count: int) -> tuple[list[float], list[float]]:
    """Lengths of an arm that is longer on the whole, and of the other."""
    rng = np.random.default_rng(7)
    other = rng.integers(5, 20, count).astype(float)
    return list(other + np.round(rng.normal(difference, spread, count))), list(other)


def test_an_arm_that_wins_by_length_alone_wins_about_half_at_equal_length() -> None:
    """P(win) = sigmoid(1.5 tanh(d / std)), a coin at d = 0; on the whole the longer arm wins far more than half."""
    lengths, others = longer_by(4.0, 5.0, 6000)
    difference = [a - b for a, b in zip(lengths, others, strict=True)]
    spread = math.sqrt(sum(d * d for d in difference) / 6000 - (sum(difference) / 6000) ** 2)
    rng = random.Random(5)
    won = [float(rng.random() < 1 / (1 + math.exp(-1.5 * math.tanh(d / spread)))) for d in difference]
    zeros = [0.5] * 6000
    assert win_rate(won, zeros, 100, 0)["value"] > 0.63
    found = length_controlled_win_rate(won, zeros, lengths, others, resamples=1000, seed=0)
    assert found["value"] == pytest.approx(0.5, abs=0.03)
    assert found["ci95"][0] < 0.5 < found["ci95"][1]


def test_an_arm_that_wins_exactly_where_it_is_longer_wins_about_half_at_equal_length() -> None:
    lengths, others = longer_by(3.0, 6.0, 2000)
    scores = [0.5 + 0.5 * float(np.sign(a - b)) for a, b in zip(lengths, others, strict=True)]
    found = length_controlled_win_rate(scores, [0.5] * 2000, lengths, others, resamples=100, seed=0)
    assert win_rate(scores, [0.5] * 2000, 100, 0)["value"] > 0.6
    assert found["value"] == pytest.approx(0.5, abs=0.05)


def test_an_arm_that_wins_whatever_its_length_keeps_its_win_rate_at_equal_length() -> None:
    lengths, others = longer_by(4.0, 5.0, 6000)
    rng = random.Random(6)
    won = [float(rng.random() < 0.8) for _ in lengths]
    found = length_controlled_win_rate(won, [0.5] * 6000, lengths, others, resamples=100, seed=0)
    assert found["value"] == pytest.approx(0.8, abs=0.03)


def test_the_length_term_is_the_most_likely_logistic_regression() -> None:
    """Against plain gradient ascent, in float64, on eight prompts."""
    lengths, others = [5.0, 9.0, 4.0, 7.0, 6.0, 12.0, 3.0, 8.0], [6.0, 4.0, 5.0, 5.0, 9.0, 6.0, 3.0, 2.0]
    won = [0.0, 1.0, 1.0, 0.5, 0.0, 1.0, 0.5, 0.0]
    difference = [a - b for a, b in zip(lengths, others, strict=True)]
    center = sum(difference) / 8
    spread = math.sqrt(sum((d - center) ** 2 for d in difference) / 8)
    term = [math.tanh(d / spread) for d in difference]
    intercept = slope = 0.0
    for _ in range(20_000):
        left = [w - 1 / (1 + math.exp(-intercept - slope * t)) for w, t in zip(won, term, strict=True)]
        intercept += 0.05 * sum(left)
        slope += 0.05 * sum(gap * t for gap, t in zip(left, term, strict=True))
    found = length_controlled_win_rate(won, [0.5] * 8, lengths, others, resamples=100, seed=0)
    assert found["value"] == pytest.approx(1 / (1 + math.exp(-intercept)), abs=1e-3)


@pytest.mark.filterwarnings("error")
def test_an_arm_that_always_wins_stays_a_number_at_equal_length() -> None:
    lengths, others = longer_by(4.0, 5.0, 300)
    found = length_controlled_win_rate([1.0] * 300, [0.0] * 300, lengths, others, resamples=100, seed=0)
    assert 0.95 < found["value"] <= 1.0
    assert all(0.95 < bound <= 1.0 for bound in found["ci95"])


# ---- variety, and best of n


@pytest.mark.parametrize(
    ("texts", "n", "share"),
    [
        (["a b c", "a b d"], 2, 3 / 4),  # ab bc ab bd
        (["a b c", "a b d"], 1, 4 / 6),
        (["a b c", "a b d"], 3, 1.0),
        (["so so so so"], 2, 1 / 3),
        (["a", "b"], 2, 1.0),  # too short for any
        (["", "a b"], 2, 1.0),
        ([], 2, 1.0),
    ],
)
def test_distinct_n_is_the_share_of_different_n_grams(texts: list[str], n: int, share: float) -> None:
    assert distinct_n(texts, n) == pytest.approx(share)


def test_n_grams_do_not_go_from_one_text_to_the_next() -> None:
    assert distinct_n(["a b", "b a"]) == 1.0
    assert distinct_n(["a b", "a b"]) == 0.5


@pytest.mark.parametrize(("n", "nats"), [(1, 0.0), (2, 0.193147), (4, 0.636294), (8, 1.204442), (64, 3.174508)])
def test_best_of_n_moves_at_most_log_n_less_n_minus_1_over_n_nats(n: int, nats: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(nats, abs=1e-6)
