"""Truncated importance weights against hand-worked numbers and a float64 loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms import ppo_policy_loss, truncated_importance_weights

NAN, INF = float("nan"), float("inf")
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=30, deadline=None)
STATS = ("weight_mean", "capped_fraction")


def random_rows(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return two arrays [B, R] with NaN in their padding, and their mask."""
    rng = np.random.default_rng(seed)
    b, r = int(rng.integers(1, 5)), int(rng.integers(1, 7))
    mask = np.arange(r) < rng.integers(0, r + 1, (b, 1))
    new, old = (np.where(mask, -rng.exponential(1.0, (b, r)), NAN).astype(np.float32) for _ in range(2))
    return torch.from_numpy(new), torch.from_numpy(old), torch.from_numpy(mask)


def oracle(new: Tensor, old: Tensor, mask: Tensor, cap: float) -> tuple[np.ndarray, dict[str, float]]:
    weights, capped, n = np.zeros(mask.shape), 0, max(int(mask.sum()), 1)
    for b, t in zip(*np.nonzero(mask.numpy()), strict=True):
        ratio = math.exp(float(new[b, t]) - float(old[b, t]))
        weights[b, t] = min(ratio, cap)
        capped += ratio > cap
    return weights, {"weight_mean": weights.sum() / n, "capped_fraction": capped / n}


def test_ratios_of_a_half_one_two_and_four_under_a_cap_of_two() -> None:
    ratios = torch.tensor([[0.5, 1.0, 4.0], [1.5, NAN, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    weights, stats = truncated_importance_weights(ratios.log(), torch.zeros(2, 3), mask)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 1.0, 2.0], [1.5, 0.0, 0.0]]))
    assert stats["weight_mean"].item() == pytest.approx(5.0 / 4)
    assert stats["capped_fraction"].item() == 0.25
    assert set(stats) == set(STATS)


def test_equal_logprobs_weigh_exactly_one_and_nothing_is_capped_at_a_cap_of_one() -> None:
    logprobs, _, mask = random_rows(3)
    weights, stats = truncated_importance_weights(logprobs, logprobs, mask, cap=1.0)
    assert torch.equal(weights, mask.float())
    assert {k: v.item() for k, v in stats.items()} == {"weight_mean": 1.0, "capped_fraction": 0.0}


@given(seeds, st.sampled_from([0.5, 1.0, 2.0, 10.0]))
@quick
def test_weights_and_stats_match_a_loop(seed: int, cap: float) -> None:
    rows = random_rows(seed)
    weights, stats = truncated_importance_weights(*rows, cap=cap)
    expected, expected_stats = oracle(*rows, cap)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(expected_stats, rel=1e-4, abs=1e-6)


@given(seeds, st.integers(0, 4))
@quick
def test_stats_of_shards_sum_to_the_whole_and_weights_are_the_same(seed: int, cut: int) -> None:
    new, old, mask = random_rows(seed)
    weights, stats = truncated_importance_weights(new, old, mask)
    shards = [
        truncated_importance_weights(new[s], old[s], mask[s], denominator=mask.sum())
        for s in (slice(0, cut), slice(cut, None))
    ]
    assert torch.equal(torch.cat([part for part, _ in shards]), weights)
    for key in STATS:
        torch.testing.assert_close(shards[0][1][key] + shards[1][1][key], stats[key], rtol=1e-5, atol=1e-6)


@given(seeds)
@quick
def test_padding_and_the_order_of_rows_change_nothing(seed: int) -> None:
    new, old, mask = random_rows(seed)
    weights, stats = truncated_importance_weights(new, old, mask)
    b, r = mask.shape
    wide = [torch.cat([torch.full((b, 2), INF), x.flip(0), torch.full((b, 1), NAN)], 1) for x in (new, old)]
    wide_mask = torch.nn.functional.pad(mask.flip(0), (2, 1))
    padded, padded_stats = truncated_importance_weights(*wide, wide_mask)
    assert torch.equal(padded[:, 2 : 2 + r], weights.flip(0))
    assert not padded[~wide_mask].any()
    torch.testing.assert_close(padded_stats, stats, rtol=1e-5, atol=1e-6)


def test_gaps_beyond_float32_give_the_cap_or_zero() -> None:
    new, old = torch.tensor([[0.0, -1e4, -1.0]]), torch.tensor([[-1e4, 0.0, -INF]])
    weights, stats = truncated_importance_weights(new, old, torch.ones(1, 3, dtype=torch.bool))
    assert weights.tolist() == [[2.0, 0.0, 2.0]]
    assert stats["capped_fraction"].item() == pytest.approx(2 / 3)
    assert stats["weight_mean"].item() == pytest.approx(4 / 3)


@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
@pytest.mark.parametrize("denominator", [None, 0, torch.tensor(7)])
def test_an_empty_mask_gives_zero_weights_and_stats(shape: tuple[int, int], denominator: Tensor | None) -> None:
    rows, mask = torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool)
    weights, stats = truncated_importance_weights(rows, rows, mask, denominator=denominator)
    assert torch.equal(weights, torch.zeros(shape))
    assert all(stat.item() == 0.0 for stat in stats.values())


def test_nothing_carries_a_gradient_and_half_precision_becomes_float32() -> None:
    new = torch.full((1, 2), -1.0, dtype=torch.bfloat16, requires_grad=True)
    weights, stats = truncated_importance_weights(new, new * 2, torch.ones(1, 2, dtype=torch.bool))
    for tensor in (weights, *stats.values()):
        assert not tensor.requires_grad
        assert tensor.dtype == torch.float32


def test_weighted_policy_loss_at_ratio_one_has_the_gradient_of_the_rollout_expectation() -> None:
    # Two tokens, sampled with 0.8 and 0.2 by the engine, 0.5 and 0.5 by the trainer: sum_i q_i w_i A_i = sum_i p_i A_i.
    engine, trainer = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.5, 0.5]])
    gain, mask = torch.tensor([[3.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool)
    weights, _ = truncated_importance_weights(trainer.log(), engine.log(), mask, cap=5.0)
    loss, _ = ppo_policy_loss(trainer.log(), trainer.log(), gain * engine, mask, weights=weights, denominator=1)
    assert loss.item() == pytest.approx(-(0.5 * 3.0 - 0.5 * 1.0))


@pytest.mark.parametrize("cap", [0.0, -1.0, INF, NAN])
def test_a_cap_that_is_not_positive_and_finite_is_refused(cap: float) -> None:
    rows = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="0 < cap < infinity"):
        truncated_importance_weights(rows, rows, rows == 0, cap=cap)


def test_logprobs_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="bool mask"):
        truncated_importance_weights(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool))
