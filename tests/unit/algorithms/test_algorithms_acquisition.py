"""Acquisition scores against hand-worked numbers and float64 loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms import bald, disagreement, margin

LOG2 = math.log(2)
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=30, deadline=None)
of_an_ensemble = pytest.mark.parametrize("score", [bald, disagreement])
every_score = pytest.mark.parametrize("score", [margin, bald, disagreement])
Score = Callable[[Tensor], Tensor]


def random_probs(seed: int) -> np.ndarray:
    """Return [M, N] probabilities, some of them exactly 0, 0.5 or 1."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 6)), int(rng.integers(0, 7)))
    return np.where(rng.random(shape) < 0.3, rng.choice([0.0, 0.5, 1.0], shape), rng.random(shape)).astype(np.float32)


def entropy(p: float) -> float:
    return -sum(x * math.log(x) for x in (p, 1 - p) if x > 0)


def oracle(probs: np.ndarray, score: Score) -> np.ndarray:
    columns = [[float(p) for p in probs[:, n]] for n in range(probs.shape[1])]
    means = [sum(own) / len(own) for own in columns]
    if score is bald:
        own_entropies = [sum(entropy(p) for p in own) / len(own) for own in columns]
        return np.array([entropy(mean) - own for mean, own in zip(means, own_entropies, strict=True)])
    return np.array([sum((p - m) ** 2 for p in own) / len(own) for own, m in zip(columns, means, strict=True)])


def test_margin_by_hand() -> None:
    probs = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert margin(probs).tolist() == [-0.5, -0.25, 0.0, -0.25, -0.5]
    assert margin(torch.full((2, 3), 0.75)).tolist() == [[-0.25] * 3] * 2


def test_bald_by_hand() -> None:
    # members split 0 and 1: log 2 - 0; both toss a coin: log 2 - log 2; both sure: 0; 0.5 and 1: H(3/4) - log 2 / 2
    probs = torch.tensor([[0.0, 0.5, 1.0, 0.5], [1.0, 0.5, 1.0, 1.0]])
    mixed = 2 * LOG2 - 0.75 * math.log(3) - LOG2 / 2
    torch.testing.assert_close(bald(probs), torch.tensor([LOG2, 0.0, 0.0, mixed]))


def test_disagreement_by_hand_is_the_population_variance() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.25], [1.0, 0.5, 0.75]])
    assert disagreement(probs).tolist() == [0.25, 0.0, 0.0625]


@of_an_ensemble
@given(seed=seeds)
@quick
def test_ensemble_scores_match_a_loop_in_any_order_of_members_and_pairs(score: Score, seed: int) -> None:
    probs = random_probs(seed)
    expected = oracle(probs, score)
    np.testing.assert_allclose(score(torch.from_numpy(probs)).numpy(), expected, rtol=1e-5, atol=1e-7)
    rng = np.random.default_rng(seed)
    members, pairs = rng.permutation(probs.shape[0]), rng.permutation(probs.shape[1])
    shuffled = score(torch.from_numpy(probs[members][:, pairs]))
    np.testing.assert_allclose(shuffled.numpy(), expected[pairs], rtol=1e-5, atol=1e-7)


@every_score
@given(seed=seeds)
@quick
def test_scores_are_finite_bounded_and_blind_to_which_response_comes_first(score: Score, seed: int) -> None:
    probs = torch.from_numpy(random_probs(seed)).double()
    scores = score(probs)
    low, high = {margin: (-0.5, 0.0), bald: (0.0, LOG2), disagreement: (0.0, 0.25)}[score]
    assert ((scores >= low) & (scores <= high + 1e-12)).all()
    torch.testing.assert_close(score(1 - probs), scores, rtol=1e-9, atol=1e-12)


@of_an_ensemble
@given(p=st.floats(0.0, 1.0), members=st.integers(1, 7))
@quick
def test_one_member_and_members_that_agree_have_nothing_to_tell(score: Score, p: float, members: int) -> None:
    scores = score(torch.full((members, 2), p, dtype=torch.float64))
    assert (scores >= 0).all()
    assert (scores < 1e-12).all()


@pytest.mark.parametrize("tiny", [1e-45, 1e-38, 1e-8])
def test_probabilities_next_to_zero_and_one_stay_finite(tiny: float) -> None:
    probs = torch.tensor([[tiny, 1 - tiny, tiny], [1 - tiny, 1.0, 0.0]])
    for score in (margin, bald, disagreement):
        assert score(probs).isfinite().all()


@every_score
def test_no_pairs_give_none_and_half_precision_gives_float32(score: Score) -> None:
    assert score(torch.zeros(3, 0)).numel() == 0
    probs = torch.full((2, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert score(probs).dtype == torch.float32
    assert not score(probs).requires_grad


@every_score
@pytest.mark.parametrize("wrong", [float("nan"), -0.01, 1.01, float("inf")])
def test_what_is_not_a_probability_is_refused(score: Score, wrong: float) -> None:
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], found"):
        score(torch.tensor([[0.5, wrong]]))


@of_an_ensemble
def test_a_missing_member_axis_is_refused(score: Score) -> None:
    for shape in [(3,), (0, 3)]:
        with pytest.raises(ValueError, match=r"shape \[M, N\] with at least one member"):
            score(torch.zeros(shape))
