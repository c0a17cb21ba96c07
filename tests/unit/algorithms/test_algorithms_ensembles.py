"""Combinations of reward models against hand-worked numbers and float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms import combine

NAN = float("nan")
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=30, deadline=None)
every_way = pytest.mark.parametrize("how", ["mean", "min", "uwo"])


def random_scores(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(rng.normal() * 5, 2.0, (int(rng.integers(1, 6)), int(rng.integers(0, 5)))).astype(np.float32)


def oracle(scores: np.ndarray, how: str, weight: float) -> list[float]:
    combined = []
    for b in range(scores.shape[1]):
        own = [float(x) for x in scores[:, b]]
        mean = sum(own) / len(own)
        variance = sum((x - mean) ** 2 for x in own) / len(own)
        combined.append({"mean": mean, "min": min(own), "uwo": mean - weight * variance}[how])
    return combined


def test_three_members_and_two_responses_by_hand() -> None:
    scores = torch.tensor([[1.0, 4.0], [3.0, 4.0], [5.0, 4.0]])
    assert combine(scores).tolist() == [3.0, 4.0]
    assert combine(scores, "min").tolist() == [1.0, 4.0]
    # the population variance of 1, 3, 5 is 8/3
    torch.testing.assert_close(combine(scores, "uwo"), torch.tensor([3 - 4 / 3, 4.0]))
    torch.testing.assert_close(combine(scores, "uwo", weight=0.1), torch.tensor([3 - 0.8 / 3, 4.0]))


@every_way
@given(seed=seeds, weight=st.sampled_from([0.0, 0.1, 0.5, 2.0]))
@quick
def test_combinations_match_a_loop_in_any_order_of_members_and_responses(how: str, seed: int, weight: float) -> None:
    scores = random_scores(seed)
    rng = np.random.default_rng(seed)
    members, responses = rng.permutation(scores.shape[0]), rng.permutation(scores.shape[1])
    expected = np.array(oracle(scores, how, weight))
    got = combine(torch.from_numpy(scores), how, weight)  # type: ignore[arg-type]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)
    shuffled = combine(torch.from_numpy(scores[members][:, responses]), how, weight)  # type: ignore[arg-type]
    np.testing.assert_allclose(shuffled.numpy(), expected[responses], rtol=1e-5, atol=1e-6)


@given(seeds)
@quick
def test_neither_the_worst_case_nor_uwo_exceeds_the_mean(seed: int) -> None:
    scores = torch.from_numpy(random_scores(seed)).double()
    mean = combine(scores)
    assert (combine(scores, "min") <= mean + 1e-9).all()
    assert (combine(scores, "uwo") <= mean).all()
    assert torch.equal(combine(scores, "uwo", weight=0.0), mean)


@every_way
@pytest.mark.parametrize("members", [1, 3, 7])
def test_one_member_and_members_that_agree_give_their_score_exactly(how: str, members: int) -> None:
    scores = torch.tensor([0.1, -7.7, 1e30])
    assert torch.equal(combine(scores.expand(members, 3), how), scores)  # type: ignore[arg-type]


def test_a_small_variance_survives_a_large_mean() -> None:
    scores = torch.tensor([[10000.0], [10001.0], [10002.0], [10003.0]])
    assert combine(scores, "uwo", weight=1000.0).item() == pytest.approx(10001.5 - 1250.0)


@every_way
def test_scores_of_1e18_stay_finite_and_no_responses_give_none(how: str) -> None:
    assert combine(torch.tensor([[1e18], [-1e18]]), how).isfinite().all()  # type: ignore[arg-type]
    assert combine(torch.zeros(3, 0), how).shape == (0,)  # type: ignore[arg-type]


@every_way
def test_a_nan_is_not_hidden_and_stays_with_its_response(how: str) -> None:
    combined = combine(torch.tensor([[NAN, 1.0], [2.0, 3.0]]), how)  # type: ignore[arg-type]
    assert combined.isnan().tolist() == [True, False]


@every_way
def test_half_precision_gives_float32_and_float64_stays(how: str) -> None:
    assert combine(torch.ones(2, 2, dtype=torch.bfloat16), how).dtype == torch.float32  # type: ignore[arg-type]
    assert combine(torch.ones(2, 2, dtype=torch.float64), how).dtype == torch.float64  # type: ignore[arg-type]


def test_an_unknown_way_and_a_missing_member_axis_are_refused() -> None:
    with pytest.raises(ValueError, match="'max'; expected 'mean', 'min' or 'uwo'"):
        combine(torch.zeros(2, 2), "max")  # type: ignore[arg-type]
    for shape in [(3,), (0, 3), (2, 3, 1)]:
        with pytest.raises(ValueError, match=r"shape \[M, B\] with at least one member"):
            combine(torch.zeros(shape))
