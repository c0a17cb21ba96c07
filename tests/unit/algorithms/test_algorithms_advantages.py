"""GAE against hand-worked numbers and the double sum of the paper's eq. 16; group estimators against loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms import gae, group_relative, leave_one_out

NAN = float("nan")
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=30, deadline=None)


def oracle(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Sum eq. 16 directly: A_t = sum_l (gamma lam)^l delta_{t+l}, up to the last valid token of the row."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(len(mask)):
        length = int(mask[b].sum())
        r, v = rewards[b, :length].astype(np.float64), np.append(values[b, :length].astype(np.float64), 0.0)
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            advantages[b, t] = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            returns[b, t] = advantages[b, t] + v[t]
    return advantages, returns


def random_batch(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    b, r = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    mask = np.arange(r) < rng.integers(0, r + 1, (b, 1))
    rewards, values = (rng.normal(size=(b, r)).astype(np.float32) for _ in range(2))
    rewards[~mask], values[~mask] = NAN, NAN
    return rewards, values, mask


def test_two_tokens_and_one_token_by_hand() -> None:
    rewards = torch.tensor([[0.0, 1.0, NAN], [2.0, NAN, NAN]])
    values = torch.tensor([[0.5, 0.25, 9.0], [0.5, 9.0, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # deltas: 0.25 - 0.5 = -0.25 and 1 - 0.25 = 0.75; A_0 = -0.25 + 0.5 * 0.75 = 0.125
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[0.125, 0.75, 0.0], [1.5, 0.0, 0.0]]
    assert returns.tolist() == [[0.625, 1.0, 0.0], [2.0, 0.0, 0.0]]


def test_discount_by_hand() -> None:
    # deltas: 1 + 0.5 * 2 - 1 = 1 and 4 - 2 = 2; A_0 = 1 + 0.5 * 0.5 * 2 = 1.5
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages, _ = gae(torch.tensor([[1.0, 4.0]]), torch.tensor([[1.0, 2.0]]), mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.5, 2.0]]


@given(seeds, st.sampled_from([(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.99, 1.0), (0.0, 0.5)]))
@quick
def test_recursion_equals_the_double_sum(seed: int, constants: tuple[float, float]) -> None:
    batch = random_batch(seed)
    for got, expected in zip(gae(*map(torch.from_numpy, batch), *constants), oracle(*batch, *constants), strict=True):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)


@given(seeds)
@quick
def test_lambda_one_returns_are_the_sum_of_rewards_to_go(seed: int) -> None:
    rewards, values, mask = random_batch(seed)
    _, returns = gae(*map(torch.from_numpy, (rewards, values, mask)), lam=1.0)
    clean = np.where(mask, rewards, 0.0).astype(np.float64)
    to_go = np.where(mask, clean[:, ::-1].cumsum(1)[:, ::-1], 0.0)
    np.testing.assert_allclose(returns.numpy(), to_go, rtol=1e-4, atol=1e-5)


@given(seeds)
@quick
def test_more_padding_and_another_order_of_rows_change_nothing(seed: int) -> None:
    rewards, values, mask = map(torch.from_numpy, random_batch(seed))
    order = torch.arange(len(mask)).flip(0)
    wide = [torch.cat([x[order], torch.full((len(x), 3), NAN)], 1) for x in (rewards, values)]
    wide_mask = torch.cat([mask[order], torch.zeros(len(mask), 3, dtype=torch.bool)], 1)
    for got, expected in zip(gae(*wide, wide_mask), gae(rewards, values, mask), strict=True):
        assert torch.equal(got[:, : mask.shape[1]], expected[order])
        assert not got[:, mask.shape[1] :].any()


def test_targets_carry_no_gradient_and_no_positions_give_an_empty_result() -> None:
    rewards, values = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    advantages, returns = gae(rewards, values, torch.ones(2, 3, dtype=torch.bool))
    assert not advantages.requires_grad
    assert not returns.requires_grad
    advantages, returns = gae(torch.ones(2, 0), torch.ones(2, 0), torch.ones(2, 0, dtype=torch.bool))
    assert advantages.shape == returns.shape == (2, 0)


def test_padding_on_the_left_is_zero_too() -> None:
    mask = torch.tensor([[False, True, True]])
    advantages, returns = gae(torch.tensor([[NAN, 0.0, 1.0]]), torch.tensor([[NAN, 0.5, 0.25]]), mask, lam=0.5)
    assert advantages.tolist() == [[0.0, 0.125, 0.75]]
    assert returns.tolist() == [[0.0, 0.625, 1.0]]


def test_rows_without_tokens_and_batches_without_rows_give_zeros_and_nothing() -> None:
    empty = torch.zeros(2, 3, dtype=torch.bool)
    advantages, returns = gae(torch.full((2, 3), NAN), torch.full((2, 3), NAN), empty)
    assert advantages.tolist() == returns.tolist() == [[0.0] * 3] * 2
    advantages, returns = gae(torch.ones(0, 3), torch.ones(0, 3), empty[:0])
    assert advantages.shape == returns.shape == (0, 3)


@given(seeds, st.integers(0, 4))
@quick
def test_a_shard_of_rows_gets_what_it_gets_in_the_whole(seed: int, cut: int) -> None:
    batch = [torch.from_numpy(a) for a in random_batch(seed)]
    for i, whole in enumerate(gae(*batch)):
        parts = [gae(*(x[s] for x in batch))[i] for s in (slice(0, cut), slice(cut, None))]
        assert torch.equal(torch.cat(parts), whole)


def test_rewards_and_values_of_1e30_stay_finite() -> None:
    rewards, values = torch.tensor([[1e30, -1e30, 1e30]]), torch.tensor([[-1e30, 1e30, -1e30]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool))
    assert advantages.isfinite().all()
    assert returns.isfinite().all()


def test_values_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="bool mask"):
        gae(torch.ones(2, 3), torch.ones(2, 1), torch.ones(2, 3, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------- groups


def relative(scores: Tensor, groups: Tensor) -> Tensor:
    return group_relative(scores, groups)


def centred(scores: Tensor, groups: Tensor) -> Tensor:
    return group_relative(scores, groups, normalize_std=False)


Estimator = Callable[[Tensor, Tensor], Tensor]
every_estimator = pytest.mark.parametrize("estimate", [relative, centred, leave_one_out])


def group_oracle(scores: np.ndarray, groups: np.ndarray, estimate: Estimator) -> list[float]:
    """Loop over the definition: the mean and deviation of the own group, or the mean of the others in it."""
    advantages = []
    for i, score in enumerate(scores.tolist()):
        own = [scores.tolist()[j] for j in range(len(scores)) if groups[j] == groups[i]]
        mean = sum(own) / len(own)
        if estimate is leave_one_out:
            others = [scores.tolist()[j] for j in range(len(scores)) if groups[j] == groups[i] and j != i]
            advantages.append(score - sum(others) / len(others) if others else 0.0)
        else:
            variance = sum((x - mean) ** 2 for x in own) / len(own)
            advantages.append((score - mean) / (math.sqrt(variance + 1e-8) if estimate is relative else 1.0))
    return advantages


def random_groups(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and interleaved labels, negative ones too; some groups of one, some without spread."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 14))
    groups = rng.integers(0, 5, n) * 7 - 9
    scores = rng.normal(rng.normal() * 5, 2.0, n).astype(np.float32)
    return np.where(groups == -2, np.float32(0.1), scores), groups


def test_two_interleaved_groups_and_a_single_response_by_hand() -> None:
    scores, groups = torch.tensor([1.0, 10.0, 3.0, -7.0, 16.0, 5.0]), torch.tensor([4, -1, 4, 9, -1, 4])
    # group 4: 1, 3, 5 with mean 3 and variance 8/3; group -1: 10, 16 with mean 13, variance 9; group 9: alone
    root = math.sqrt(1.5)
    torch.testing.assert_close(group_relative(scores, groups), torch.tensor([-root, -1.0, 0.0, 0.0, 1.0, root]))
    assert centred(scores, groups).tolist() == [-2.0, -3.0, 0.0, 0.0, 3.0, 2.0]
    # the others of 1, 3, 5 average 4, 3, 2; those of 10, 16 are 16, 10
    assert leave_one_out(scores, groups).tolist() == [-3.0, -6.0, 0.0, 0.0, 6.0, 3.0]


def test_the_deviation_is_that_of_the_population_so_two_responses_get_plus_and_minus_one() -> None:
    advantages = group_relative(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0]))


@every_estimator
@given(seed=seeds)
@quick
def test_group_estimators_match_a_loop(estimate: Estimator, seed: int) -> None:
    scores, groups = random_groups(seed)
    got = estimate(torch.from_numpy(scores), torch.from_numpy(groups))
    np.testing.assert_allclose(got.numpy(), group_oracle(scores, groups, estimate), rtol=1e-5, atol=1e-6)


@every_estimator
@given(seed=seeds)
@quick
def test_order_labels_and_a_constant_added_to_a_group_change_nothing(estimate: Estimator, seed: int) -> None:
    scores, groups = map(torch.from_numpy, random_groups(seed))
    expected = estimate(scores, groups)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(scores)))
    torch.testing.assert_close(estimate(scores[order], groups[order]), expected[order])
    torch.testing.assert_close(estimate(scores, 1000 - 3 * groups), expected)
    # in float64, where adding the constant itself rounds little
    shifted = estimate(scores.double() + groups, groups)
    torch.testing.assert_close(shifted, estimate(scores.double(), groups), rtol=1e-7, atol=1e-7)


@every_estimator
@given(seed=seeds)
@quick
def test_each_group_sums_to_zero_and_stands_alone(estimate: Estimator, seed: int) -> None:
    scores, groups = map(torch.from_numpy, random_groups(seed))
    advantages = estimate(scores, groups)
    for label in groups.unique():
        own = groups == label
        assert advantages[own].sum().item() == pytest.approx(0.0, abs=1e-4)
        torch.testing.assert_close(estimate(scores[own], groups[own]), advantages[own])


@given(seeds)
@quick
def test_a_group_with_spread_has_mean_square_one_whatever_its_size(seed: int) -> None:
    scores, groups = map(torch.from_numpy, random_groups(seed))
    advantages = group_relative(scores, groups)
    for label in groups.unique():
        own = groups == label
        if scores[own].double().std(unbiased=False) > 0.1:
            assert advantages[own].square().mean().item() == pytest.approx(1.0, rel=1e-4)


@every_estimator
@pytest.mark.parametrize("level", [0.0, 0.1, -7.7, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_groups_of_one_and_groups_without_spread_give_exactly_zero(
    estimate: Estimator, level: float, dtype: torch.dtype
) -> None:
    groups = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3])
    advantages = estimate(torch.full((13,), level, dtype=dtype), groups)
    assert advantages.tolist() == [0.0] * 13
    assert advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_spread_the_size_of_rounding_is_not_blown_up_to_one() -> None:
    scores = torch.tensor([1.0, 1.0 + 2**-23])
    assert group_relative(scores, torch.tensor([5, 5])).abs().max().item() < 1e-3


@every_estimator
def test_scores_at_the_ends_of_float32_stay_finite(estimate: Estimator) -> None:
    scores = torch.tensor([-1e38, 1e38, 1e-38, 0.0, 1e38, -1e38, 1e38])
    assert estimate(scores, torch.tensor([0, 0, 1, 1, 2, 2, 2])).isfinite().all()


@every_estimator
def test_a_nan_score_is_not_hidden_and_stays_in_its_group(estimate: Estimator) -> None:
    advantages = estimate(torch.tensor([NAN, 1.0, 2.0, 4.0]), torch.tensor([0, 1, 0, 1]))
    assert advantages.isnan().tolist() == [True, False, True, False]


@every_estimator
def test_group_advantages_are_targets_and_no_responses_give_none(estimate: Estimator) -> None:
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not estimate(scores, torch.tensor([0, 0])).requires_grad
    assert estimate(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


@every_estimator
def test_scores_and_groups_that_disagree_are_refused(estimate: Estimator) -> None:
    with pytest.raises(ValueError, match="one shape"):
        estimate(torch.zeros(3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="one shape"):
        estimate(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="integer labels"):
        estimate(torch.zeros(2), torch.zeros(2))
