"""Losses against hand-worked numbers and float64 NumPy loops; shards, padding, extremes, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms import lm_loss, ppo_policy_loss, ppo_value_loss, ranking_loss

NAN = float("nan")
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=30, deadline=None)
SUMMED_STATS = ("clip_fraction", "ratio_mean", "approx_kl")


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def random_rows(seed: int, count: int = 3) -> tuple[list[Tensor], Tensor]:
    """Return `count` arrays [B, R] with NaN in their padding, and their mask."""
    rng = np.random.default_rng(seed)
    b, r = int(rng.integers(1, 5)), int(rng.integers(1, 7))
    mask = np.arange(r) < rng.integers(0, r + 1, (b, 1))
    arrays = [np.where(mask, rng.normal(size=(b, r)), NAN).astype(np.float32) for _ in range(count)]
    return [torch.from_numpy(a) for a in arrays], torch.from_numpy(mask)


def policy_oracle(
    new: Tensor, old: Tensor, gain: Tensor, mask: Tensor, clip: float, dual_clip: float | None, weights: Tensor | None
) -> tuple[float, dict[str, float]]:
    total, clipped, ratios, kls, largest, count = 0.0, 0, 0.0, 0.0, 0.0, 0
    for b, t in zip(*np.nonzero(mask.numpy()), strict=True):
        log_ratio, a = float(new[b, t]) - float(old[b, t]), float(gain[b, t])
        ratio = math.exp(log_ratio)
        inner = min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
        clipped += (a > 0 and ratio > 1 + clip) or (a < 0 and ratio < 1 - clip)
        if dual_clip is not None and a < 0:
            inner = max(inner, dual_clip * a)
        total -= inner * (1.0 if weights is None else float(weights[b, t]))
        ratios, kls, largest, count = (
            ratios + ratio,
            kls + ratio - 1 - log_ratio,
            max(largest, abs(log_ratio)),
            count + 1,
        )
    n = max(count, 1)
    stats = {"clip_fraction": clipped / n, "ratio_mean": ratios / n, "approx_kl": kls / n}
    return total / n, {**stats, "max_abs_log_ratio": largest}


# ------------------------------------------------------------------------------------------------- policy


def policy_case(**options: float) -> tuple[float, dict[str, float]]:
    """Ratios 1.5, 0.5, 1.1, 4 with advantages 2, -1, 3, -1, then a token of padding."""
    ratios = torch.tensor([[1.5, 0.5, 1.1, 4.0, NAN]])
    gain = torch.tensor([[2.0, -1.0, 3.0, -1.0, NAN]])
    mask = torch.tensor([[True, True, True, True, False]])
    loss, stats = ppo_policy_loss(ratios.log(), torch.zeros(1, 5), gain, mask, **options)
    return loss.item(), {k: v.item() for k, v in stats.items()}


def test_policy_loss_by_hand() -> None:
    # min(3, 2.4) = 2.4; min(-0.5, -0.8) = -0.8; min(3.3, 3.6) = 3.3; min(-4, -1.2) = -4; the mean is 0.225
    loss, stats = policy_case()
    assert loss == pytest.approx(-0.225, rel=1e-5)
    assert stats["clip_fraction"] == pytest.approx(0.5)
    assert stats["ratio_mean"] == pytest.approx(7.1 / 4)
    # mean of ratio - 1 - log ratio: (7.1 - 4 - log(1.5 * 0.5 * 1.1 * 4)) / 4
    assert stats["approx_kl"] == pytest.approx((3.1 - math.log(3.3)) / 4, rel=1e-5)
    assert stats["max_abs_log_ratio"] == pytest.approx(math.log(4))
    assert set(stats) == {*SUMMED_STATS, "max_abs_log_ratio"}


def test_dual_clip_limits_only_negative_advantages() -> None:
    # the last token gives max(-4, -3) = -3: 2.4 - 0.8 + 3.3 - 3 = 1.9
    assert policy_case(dual_clip=3.0)[0] == pytest.approx(-1.9 / 4, rel=1e-5)
    with pytest.raises(ValueError, match="dual_clip > 1"):
        policy_case(dual_clip=1.0)


def test_policy_weights_multiply_each_token_and_denominator_stays_the_token_count() -> None:
    mask = torch.tensor([[True, True, False]])
    weights, gain = torch.tensor([[0.5, 2.0, NAN]]), torch.tensor([[1.0, 3.0, NAN]])
    zeros = torch.zeros(1, 3)
    assert ppo_policy_loss(zeros, zeros, gain, mask, weights=weights)[0].item() == pytest.approx(-3.25)


def test_an_unchanged_policy_has_ratio_one_and_clips_nothing_exactly() -> None:
    (logprobs, gain), mask = random_rows(3, 2)
    _, stats = ppo_policy_loss(logprobs, logprobs, gain, mask)
    assert {k: v.item() for k, v in stats.items()} == {
        "clip_fraction": 0.0,
        "ratio_mean": 1.0,
        "approx_kl": 0.0,
        "max_abs_log_ratio": 0.0,
    }


@given(seeds, st.sampled_from([None, 1.5, 3.0]), st.booleans())
@quick
def test_policy_loss_matches_a_loop(seed: int, dual_clip: float | None, weighted: bool) -> None:
    (new, old, gain, raw), mask = random_rows(seed, 4)
    weights = raw.abs() if weighted else None
    loss, stats = ppo_policy_loss(new, old, gain, mask, 0.2, dual_clip, weights)
    expected, expected_stats = policy_oracle(new, old, gain, mask, 0.2, dual_clip, weights)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(expected_stats, rel=1e-4, abs=1e-5)


def test_policy_gradient_at_ratio_one_is_minus_advantage_over_count() -> None:
    new = torch.tensor([[-1.0, -2.0, NAN]], requires_grad=True)
    gain = torch.tensor([[3.0, -5.0, NAN]])
    loss, _ = ppo_policy_loss(new, new.detach(), gain, torch.tensor([[True, True, False]]))
    loss.backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.tensor([[-1.5, 2.5, 0.0]]))


def test_only_the_new_logprobs_and_the_new_values_get_a_gradient() -> None:
    rows, mask = random_rows(5, 4)
    for row in rows:
        row.requires_grad_()
    policy_loss, _ = ppo_policy_loss(*rows[:3], mask, weights=rows[3])
    value_loss, _ = ppo_value_loss(*rows[:3], mask)
    (policy_loss + value_loss).backward()
    assert rows[0].grad is not None
    assert all(row.grad is None for row in rows[1:])


def test_policy_gradient_is_zero_where_the_clip_holds() -> None:
    new = torch.tensor([[math.log(1.5), math.log(0.5), math.log(1.5), math.log(0.5)]], requires_grad=True)
    gain = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    loss, _ = ppo_policy_loss(new, torch.zeros(1, 4), gain, torch.ones(1, 4, dtype=torch.bool))
    loss.backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, 0.0, 1.5 / 4, -0.5 / 4]]))


@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("gain", [1.0, -1.0])
def test_gaps_of_ten_thousand_nats_stay_finite_and_are_reported_unlimited(gap: float, gain: float) -> None:
    new = torch.full((1, 2), gap, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, stats = ppo_policy_loss(new, torch.zeros(1, 2), torch.full((1, 2), gain), mask)
    loss.backward()
    assert loss.isfinite()
    assert new.grad is not None
    assert new.grad.isfinite().all()
    assert all(value.isfinite() for value in stats.values())
    assert stats["max_abs_log_ratio"].item() == 1e4


# -------------------------------------------------------------------------------------------------- value


def test_value_loss_by_hand() -> None:
    # V 1.0, old 0.5 -> clipped 0.7; return 1: max(0, 0.09). V 0.6, old 0.5, return 0: 0.36 both ways.
    # V 2.0, old 0.5 -> 0.7; return 0: max(4, 0.49).
    values, old = torch.tensor([[1.0, 0.6, 2.0, NAN]]), torch.tensor([[0.5, 0.5, 0.5, NAN]])
    returns, mask = torch.tensor([[1.0, 0.0, 0.0, NAN]]), torch.tensor([[True, True, True, False]])
    loss, stats = ppo_value_loss(values, old, returns, mask)
    assert loss.item() == pytest.approx(0.5 * (0.09 + 0.36 + 4.0) / 3, rel=1e-5)
    assert stats["clip_fraction"].item() == pytest.approx(1 / 3)


@given(seeds)
@quick
def test_value_loss_matches_a_loop(seed: int) -> None:
    (values, old, returns), mask = random_rows(seed)
    total, clipped, count = 0.0, 0, int(mask.sum())
    for b, t in zip(*np.nonzero(mask.numpy()), strict=True):
        v, o, g = float(values[b, t]), float(old[b, t]), float(returns[b, t])
        limited = min(max(v, o - 0.2), o + 0.2)
        total += 0.5 * max((v - g) ** 2, (limited - g) ** 2)
        clipped += (limited - g) ** 2 > (v - g) ** 2
    loss, stats = ppo_value_loss(values, old, returns, mask)
    assert loss.item() == pytest.approx(total / max(count, 1), rel=1e-4, abs=1e-6)
    assert stats["clip_fraction"].item() == pytest.approx(clipped / max(count, 1))


def test_values_inside_the_range_count_as_unclipped_despite_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    old = -0.1 * torch.rand(50, 50, generator=generator)  # opposite signs: values - old must round
    values = 0.1 * torch.rand(50, 50, generator=generator)
    _, stats = ppo_value_loss(values, old, torch.zeros(50, 50), torch.ones(50, 50, dtype=torch.bool))
    assert stats["clip_fraction"].item() == 0.0


def test_value_gradient_is_the_error_inside_the_range_and_zero_where_the_clip_holds() -> None:
    values = torch.tensor([[0.6, 1.0]], requires_grad=True)
    loss, _ = ppo_value_loss(values, torch.full((1, 2), 0.5), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([[-0.2, 0.0]]))


# ------------------------------------------------------------------------------------ all masked losses


def policy(rows: list[Tensor], mask: Tensor, denominator: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    return ppo_policy_loss(rows[0], rows[1], rows[2], mask, denominator=denominator)


def value(rows: list[Tensor], mask: Tensor, denominator: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    return ppo_value_loss(rows[0], rows[1], rows[2], mask, denominator=denominator)


def language(rows: list[Tensor], mask: Tensor, denominator: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    return lm_loss(rows[0], mask, denominator), {}


every_loss = pytest.mark.parametrize("loss_of", [policy, value, language])
Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def test_lm_loss_by_hand() -> None:
    logprobs, mask = torch.tensor([[-1.0, -2.0, NAN], [-4.5, NAN, NAN]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert lm_loss(logprobs, mask).item() == 2.5
    assert lm_loss(logprobs, mask, denominator=10).item() == 0.75


@every_loss
@given(seed=seeds, cut=st.integers(0, 4))
@quick
def test_losses_stats_and_gradients_of_shards_sum_to_the_whole(loss_of: Loss, seed: int, cut: int) -> None:
    rows, mask = random_rows(seed)
    rows[0].requires_grad_()
    whole, stats = loss_of(rows, mask)
    (gradient,) = torch.autograd.grad(whole, rows[0])
    parts = [loss_of([x[s] for x in rows], mask[s], mask.sum()) for s in (slice(0, cut), slice(cut, None))]
    total = parts[0][0] + parts[1][0]
    (summed,) = torch.autograd.grad(total, rows[0])
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(summed, gradient, rtol=1e-5, atol=1e-6)
    for key in set(stats) - {"max_abs_log_ratio"}:
        torch.testing.assert_close(parts[0][1][key] + parts[1][1][key], stats[key], rtol=1e-5, atol=1e-6)


@every_loss
@given(seed=seeds)
@quick
def test_padding_and_the_order_of_rows_change_neither_loss_nor_stats(loss_of: Loss, seed: int) -> None:
    rows, mask = random_rows(seed)
    b = len(mask)
    wide = [torch.cat([x.flip(0), torch.full((b, 2), NAN)], 1) for x in rows]
    wide_mask = torch.cat([mask.flip(0), torch.zeros(b, 2, dtype=torch.bool)], 1)
    (loss, stats), (padded, padded_stats) = loss_of(rows, mask), loss_of(wide, wide_mask)
    torch.testing.assert_close(padded, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded_stats, stats, rtol=1e-5, atol=1e-6)


@every_loss
@given(seed=seeds)
@quick
def test_nan_in_padding_reaches_neither_loss_nor_gradient(loss_of: Loss, seed: int) -> None:
    rows, mask = random_rows(seed)
    # padding made NaN inside the graph, as a model's own NaN would be
    weight = torch.ones((), requires_grad=True)
    rows[0].requires_grad_()
    loss, stats = loss_of([torch.where(mask, weight, torch.ones(())) * rows[0], *rows[1:]], mask)
    loss.backward()
    assert loss.isfinite()
    assert all(stat.isfinite() and not stat.requires_grad for stat in stats.values())
    assert rows[0].grad is not None
    assert rows[0].grad.isfinite().all()
    assert not rows[0].grad[~mask].any()
    assert weight.grad is not None
    assert weight.grad.isfinite()


@every_loss
@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
@pytest.mark.parametrize("denominator", [None, torch.tensor(0), torch.tensor(7)])
def test_an_empty_mask_gives_zero_with_a_zero_gradient(
    loss_of: Loss, shape: tuple[int, int], denominator: Tensor | None
) -> None:
    rows = [torch.full(shape, NAN) for _ in range(3)]
    rows[0].requires_grad_()
    loss, stats = loss_of(rows, torch.zeros(shape, dtype=torch.bool), denominator)
    loss.backward()
    assert loss.item() == 0.0
    assert all(stat.item() == 0.0 for stat in stats.values())
    assert rows[0].grad is not None
    assert not rows[0].grad.any()


@every_loss
def test_rows_of_one_token_give_finite_float32_scalars(loss_of: Loss) -> None:
    rows = [torch.full((1, 1), x, dtype=torch.bfloat16) for x in (-1.0, -1.5, 2.0)]
    loss, stats = loss_of(rows, torch.ones(1, 1, dtype=torch.bool), torch.tensor(1.0, dtype=torch.float64))
    for scalar in (loss, *stats.values()):
        assert scalar.isfinite()
        assert scalar.shape == ()
        assert scalar.dtype == torch.float32


@every_loss
def test_gradients_agree_with_finite_differences(loss_of: Loss) -> None:
    rows, mask = random_rows(11)
    others = [x.double() for x in rows[1:]]
    start = rows[0].double().nan_to_num(0.0).requires_grad_()
    assert mask.any()
    assert torch.autograd.gradcheck(lambda x: loss_of([x, *others], mask)[0], (start,))


# ------------------------------------------------------------------------------------------------ ranking


def ranking_oracle(scores: np.ndarray, ranks: np.ndarray, prompts: np.ndarray) -> float:
    means = []
    for prompt in sorted(set(prompts.tolist())):
        own = [i for i in range(len(prompts)) if prompts[i] == prompt]
        losses = [softplus(float(scores[j]) - float(scores[i])) for i in own for j in own if ranks[i] < ranks[j]]
        if losses:
            means.append(sum(losses) / len(losses))
    return sum(means) / len(means) if means else 0.0


def random_ranking(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 13))
    return rng.normal(size=n).astype(np.float32) * 3, rng.integers(1, 4, n), rng.integers(0, 4, n) * 7 - 3


def test_ranking_loss_by_hand_with_interleaved_prompts_and_ties() -> None:
    scores = torch.tensor([2.0, 0.0, 1.0, 5.0, 0.0, 9.0])
    ranks = torch.tensor([1, 2, 3, 1, 1, 1])
    prompts = torch.tensor([7, 4, 7, 7, 4, 1])
    # prompt 7: ranks 1, 3, 1 with scores 2, 1, 5: pairs 2 > 1 and 5 > 1; prompt 4: 0 > 0; prompt 1: no pair
    expected = (0.5 * (softplus(-1.0) + softplus(-4.0)) + math.log(2)) / 2
    assert ranking_loss(scores, ranks, prompts).item() == pytest.approx(expected, rel=1e-6)
    assert ranking_loss(scores, ranks, prompts, denominator=8).item() == pytest.approx(expected / 4, rel=1e-6)


def test_equal_scores_lose_log_two() -> None:
    loss = ranking_loss(torch.zeros(4), torch.tensor([1, 2, 3, 4]), torch.zeros(4, dtype=torch.long))
    assert loss.item() == pytest.approx(math.log(2))


@given(seeds)
@quick
def test_ranking_loss_matches_a_loop_in_any_order_of_responses(seed: int) -> None:
    arrays = random_ranking(seed)
    expected = ranking_oracle(*arrays)
    assert ranking_loss(*map(torch.from_numpy, arrays)).item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    order = np.random.default_rng(seed).permutation(len(arrays[0]))
    shuffled = ranking_loss(*(torch.from_numpy(a[order]) for a in arrays))
    assert shuffled.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@given(seeds)
@quick
def test_ranking_shards_by_prompt_sum_to_the_whole(seed: int) -> None:
    scores, ranks, prompts = random_ranking(seed)
    with_pairs = sum(len(set(ranks[prompts == p].tolist())) > 1 for p in set(prompts.tolist()))
    total = 0.0
    for part in (prompts > 0, prompts <= 0):
        shard = (torch.from_numpy(a[part]) for a in (scores, ranks, prompts))
        total += ranking_loss(*shard, denominator=with_pairs).item()
    assert total == pytest.approx(ranking_oracle(scores, ranks, prompts), rel=1e-5, abs=1e-7)


def test_ranking_is_finite_at_extreme_scores_and_pushes_the_right_way() -> None:
    scores = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([1, 2, 2]), torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert loss.item() == pytest.approx(15_000.0)
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, torch.tensor([-1.0, 0.5, 0.5]))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_no_pairs_give_zero_with_a_zero_gradient(n: int) -> None:
    scores = torch.full((n,), NAN, requires_grad=True)
    loss = ranking_loss(scores, torch.ones(n, dtype=torch.long), torch.zeros(n, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_ranking_gradients_agree_with_finite_differences() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    ranks, prompts = torch.tensor([1, 2, 3, 1]), torch.tensor([0, 0, 0, 1])
    assert torch.autograd.gradcheck(lambda x: ranking_loss(x, ranks, prompts), (scores,))


def test_ranking_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        ranking_loss(torch.zeros(2, 1), torch.ones(2), torch.zeros(2))
