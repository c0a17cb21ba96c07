"""Masked means, moments and whitening against hand-worked numbers and float64 NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayrlhf.algorithms as algorithms
from rayrlhf.algorithms import masked_mean, masked_moments, masked_var, masked_whiten, whiten_with_moments

NAN, INF = float("nan"), float("inf")
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=30, deadline=None)

X = torch.tensor([[1.0, 3.0, NAN], [5.0, INF, -INF]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def random_batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 5)), int(rng.integers(1, 8)))
    x = rng.normal(rng.normal(), 2.0, shape).astype(np.float32)
    mask = rng.random(shape) < 0.6
    x[~mask] = rng.choice([NAN, INF, -INF, 1e30], int((~mask).sum()))
    return x, mask


def test_every_public_name_exists_and_the_list_is_sorted() -> None:
    assert sorted(algorithms.__all__) == algorithms.__all__
    assert all(hasattr(algorithms, name) for name in algorithms.__all__)


def test_mean_of_one_three_five_is_three_whatever_the_padding_holds() -> None:
    assert masked_mean(X, MASK).item() == 3.0


def test_an_explicit_denominator_replaces_the_count() -> None:
    assert masked_mean(X, MASK, 6).item() == 1.5
    assert masked_mean(X, MASK, torch.tensor(6)).item() == 1.5
    assert masked_mean(X, MASK, torch.tensor(0.5, dtype=torch.float64)).item() == 18.0
    assert masked_mean(X, MASK, torch.tensor(6.0, dtype=torch.float64)).dtype == torch.float32


def test_moments_of_one_three_five_are_three_nine_thirty_five_in_float64() -> None:
    moments = masked_moments(X, MASK)
    assert [m.item() for m in moments] == [3.0, 9.0, 35.0]
    assert all(m.dtype == torch.float64 and m.dim() == 0 for m in moments)


def test_variance_of_one_three_five_is_eight_thirds_or_unbiased_four() -> None:
    assert masked_var(X, MASK).item() == pytest.approx(8 / 3, rel=1e-7)
    assert masked_var(X, MASK, unbiased=True).item() == pytest.approx(4.0, rel=1e-7)


def test_whitening_one_three_five_gives_root_three_halves() -> None:
    root = math.sqrt(1.5)
    expected = torch.tensor([[-root, 0.0, 0.0], [root, 0.0, 0.0]])
    torch.testing.assert_close(masked_whiten(X, MASK), expected)


def test_whitening_without_shift_keeps_the_mean_at_valid_tokens_only() -> None:
    root = math.sqrt(1.5)
    expected = torch.tensor([[3 - root, 3.0, 0.0], [3 + root, 0.0, 0.0]])
    torch.testing.assert_close(masked_whiten(X, MASK, shift_mean=False), expected)


def test_unbiased_whitening_divides_by_the_unbiased_deviation() -> None:
    expected = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(masked_whiten(X, MASK, unbiased=True), expected)


@given(seeds)
@quick
def test_mean_variance_and_whitening_match_numpy_in_float64(seed: int) -> None:
    x, mask = random_batch(seed)
    valid = x[mask].astype(np.float64)
    tx, tm = torch.from_numpy(x), torch.from_numpy(mask)
    assert masked_mean(tx, tm).item() == pytest.approx(valid.mean() if valid.size else 0.0, rel=1e-5, abs=1e-6)
    assert masked_var(tx, tm).item() == pytest.approx(valid.var() if valid.size else 0.0, rel=1e-6)
    if valid.size > 1:
        assert masked_var(tx, tm, unbiased=True).item() == pytest.approx(valid.var(ddof=1), rel=1e-6)
        expected = np.zeros(x.shape)
        expected[mask] = (valid - valid.mean()) / np.sqrt(valid.var() + 1e-8)
        np.testing.assert_allclose(masked_whiten(tx, tm).numpy(), expected, rtol=1e-5, atol=1e-6)


@given(seeds, st.integers(1, 4))
@quick
def test_shards_sum_to_the_whole(seed: int, cut: int) -> None:
    x, mask = (torch.from_numpy(a) for a in random_batch(seed))
    shards = [(x[:cut], mask[:cut]), (x[cut:], mask[cut:])]  # the second may be empty
    total = sum(masked_mean(a, m, mask.sum()) for a, m in shards)
    torch.testing.assert_close(total, masked_mean(x, mask), rtol=1e-5, atol=1e-6)
    parts = [masked_moments(a, m) for a, m in shards]
    moments = [sum(values) for values in zip(*parts, strict=True)]
    for shift_mean in (True, False):
        white = torch.cat([whiten_with_moments(a, m, *moments, shift_mean=shift_mean) for a, m in shards])
        torch.testing.assert_close(white, masked_whiten(x, mask, shift_mean=shift_mean), rtol=1e-6, atol=1e-7)


@given(seeds)
@quick
def test_more_padding_and_another_order_of_rows_change_nothing(seed: int) -> None:
    x, mask = (torch.from_numpy(a) for a in random_batch(seed))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed % 1000))
    wide = torch.cat([x[order], torch.full((len(x), 3), NAN)], dim=1)
    wide_mask = torch.cat([mask[order], torch.zeros(len(x), 3, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(masked_mean(wide, wide_mask), masked_mean(x, mask), rtol=1e-5, atol=1e-6)
    white = masked_whiten(wide, wide_mask)
    torch.testing.assert_close(white[:, : x.shape[1]], masked_whiten(x, mask)[order], rtol=1e-5, atol=1e-6)
    assert not white[:, x.shape[1] :].any()


def test_variance_survives_a_mean_of_ten_thousand_deviations() -> None:
    x = torch.tensor([[10000.0, 10001.0, 10002.0, 10003.0]])
    mask = torch.ones_like(x, dtype=torch.bool)
    assert masked_var(x, mask).item() == pytest.approx(1.25, rel=1e-6)
    expected = torch.tensor([[-1.5, -0.5, 0.5, 1.5]]) / math.sqrt(1.25)
    torch.testing.assert_close(masked_whiten(x, mask), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", [1.3, 0.1, -7.7, 123.4])  # rounding of the moments falls on either side of 0
@pytest.mark.parametrize("unbiased", [False, True])
def test_a_constant_a_single_token_and_an_empty_mask_have_variance_zero(unbiased: bool, level: float) -> None:
    constant = torch.full((4, 1000), level)
    full = torch.ones(4, 1000, dtype=torch.bool)
    single, empty = torch.zeros_like(full), torch.zeros_like(full)
    single[2, 7] = True
    for mask in (full, single, empty):
        assert masked_var(constant, mask, unbiased=unbiased).item() == pytest.approx(0.0, abs=1e-10)
        white = masked_whiten(constant, mask, unbiased=unbiased)
        assert white.abs().max().item() < 1e-6
        kept = masked_whiten(constant, mask, shift_mean=False, unbiased=unbiased)
        torch.testing.assert_close(kept, torch.where(mask, level, 0.0))


def test_moments_whose_variance_rounds_below_zero_whiten_to_zero() -> None:
    x, mask = torch.full((1, 3), 2.0), torch.ones(1, 3, dtype=torch.bool)
    white = whiten_with_moments(x, mask, torch.tensor(3.0), torch.tensor(6.0), torch.tensor(11.9))
    assert white.tolist() == [[0.0, 0.0, 0.0]]


def test_an_empty_mask_gives_zero_attached_to_the_graph() -> None:
    x = torch.full((2, 3), NAN, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for denominator in (None, 0, 7, torch.tensor(0)):
        mean = masked_mean(x, mask, denominator)
        assert mean.item() == 0.0
        (gradient,) = torch.autograd.grad(mean, x)
        assert not gradient.any()
    assert masked_mean(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool)).item() == 0.0


def test_nan_in_padding_reaches_no_gradient() -> None:
    for function in (masked_mean, masked_var, lambda x, m: masked_whiten(x, m).square().sum()):
        x = X.clone().requires_grad_()
        function(x, MASK).backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert not x.grad[~MASK].any()


def test_nan_at_a_valid_token_is_not_hidden() -> None:
    assert masked_mean(torch.tensor([NAN, 1.0]), torch.tensor([True, True])).isnan()


def test_half_precision_is_computed_in_float32() -> None:
    x = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    mask = torch.ones(1, 4096, dtype=torch.bool)
    assert masked_mean(x, mask, 1).item() == 4096.0
    assert masked_whiten(x, mask).dtype == masked_var(x, mask).dtype == torch.float32


def test_a_mask_of_another_shape_or_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bool mask of shape \(2, 3\)"):
        masked_mean(X, MASK[:1])
    with pytest.raises(ValueError, match=r"torch\.float32"):
        masked_mean(X, MASK.float())
