"""GAE against hand-worked numbers and the double sum of the paper's eq. 16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms import gae

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


def test_values_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="bool mask"):
        gae(torch.ones(2, 3), torch.ones(2, 1), torch.ones(2, 3, dtype=torch.bool))
