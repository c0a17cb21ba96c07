"""What holds of every public function: no NaN and no infinity from any valid input, in results and gradients.

Then properties of single functions that the files by module leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rayrlhf.algorithms as algorithms
from rayrlhf.algorithms import (
    bald,
    combine,
    disagreement,
    dpo_loss,
    gae,
    group_relative,
    kl_estimate,
    leave_one_out,
    lm_loss,
    margin,
    masked_mean,
    masked_moments,
    masked_var,
    masked_whiten,
    ppo_policy_loss,
    ppo_value_loss,
    ranking_loss,
    token_rewards,
    treat_truncated,
    truncated_importance_weights,
    whiten_with_moments,
)

NAN, INF = float("nan"), float("inf")
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=30, deadline=None)
EXTREMES = [0.0, 1e-30, -1e-30, 1.0, -1.0, 1e4, -1e4, 1e15, -1e15]  # squares stay inside float32


class Draw:
    """Extreme tensors of one random size: B sequences, R positions, N responses, M members; 0 is a size too."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.b, self.r, self.n = (int(x) for x in self.rng.integers(0, 6, 3))
        self.m = int(self.rng.integers(1, 4))
        self.mask = torch.from_numpy(self.rng.random((self.b, self.r)) < self.rng.choice([0.0, 0.5, 1.0]))
        self.inputs: list[Tensor] = []

    def extreme(self, *shape: int) -> Tensor:
        x = torch.from_numpy(self.rng.choice(EXTREMES, shape).astype(np.float32))
        self.inputs.append(x.requires_grad_())
        return x

    def tokens(self) -> Tensor:
        """[B, R] with NaN and infinities at masked positions."""
        x = self.extreme(self.b, self.r)
        padding = torch.from_numpy(self.rng.choice([NAN, INF, -INF], self.mask.shape).astype(np.float32))
        return torch.where(self.mask, x, padding)

    def labels(self) -> Tensor:
        return torch.from_numpy(self.rng.integers(-1, 3, self.n))

    def probs(self) -> Tensor:
        return torch.from_numpy(self.rng.choice([0.0, 1e-45, 1e-8, 0.5, 1.0], (self.m, self.n)).astype(np.float32))

    def choose(self, *options: object) -> object:
        return options[int(self.rng.integers(len(options)))]


CASES: dict[str, Callable[[Draw], object]] = {
    "bald": lambda d: bald(d.probs()),
    "combine": lambda d: combine(d.extreme(d.m, d.b), d.choose("mean", "min", "uwo")),  # type: ignore[arg-type]
    "disagreement": lambda d: disagreement(d.probs()),
    "dpo_loss": lambda d: dpo_loss(*(d.extreme(d.b) for _ in range(4))),
    "gae": lambda d: gae(d.tokens(), d.tokens(), d.mask),
    "group_relative": lambda d: group_relative(d.extreme(d.n), d.labels(), bool(d.choose(True, False))),
    "kl_estimate": lambda d: kl_estimate(
        d.extreme(d.b, d.r),
        d.extreme(d.b, d.r),
        d.choose("k1", "k2", "k3"),  # type: ignore[arg-type]
    ),
    "leave_one_out": lambda d: leave_one_out(d.extreme(d.n), d.labels()),
    "lm_loss": lambda d: lm_loss(d.tokens(), d.mask),
    "margin": lambda d: margin(d.probs()),
    "masked_mean": lambda d: masked_mean(d.tokens(), d.mask),
    "masked_moments": lambda d: masked_moments(d.tokens(), d.mask),
    "masked_var": lambda d: masked_var(d.tokens(), d.mask, bool(d.choose(True, False))),
    "masked_whiten": lambda d: masked_whiten(d.tokens(), d.mask, bool(d.choose(True, False))),
    "ppo_policy_loss": lambda d: ppo_policy_loss(
        d.tokens(),
        d.tokens(),
        d.tokens(),
        d.mask,
        dual_clip=d.choose(None, 3.0),  # type: ignore[arg-type]
        weights=d.choose(None, torch.where(d.mask, 2.0, NAN)),  # type: ignore[arg-type]
    ),
    "ppo_value_loss": lambda d: ppo_value_loss(d.tokens(), d.tokens(), d.tokens(), d.mask),
    "ranking_loss": lambda d: ranking_loss(d.extreme(d.n), d.labels(), d.labels()),
    "token_rewards": lambda d: token_rewards(d.extreme(d.b), d.tokens(), d.mask, 0.02),
    "treat_truncated": lambda d: treat_truncated(d.extreme(d.b), d.mask.any(1), "penalty", 1.5),
    "truncated_importance_weights": lambda d: truncated_importance_weights(d.tokens(), d.tokens(), d.mask),
    "whiten_with_moments": lambda d: whiten_with_moments(d.tokens(), d.mask, *masked_moments(d.tokens(), d.mask)),
}


def tensors_in(result: object) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        yield from result.values()
    elif isinstance(result, tuple):
        for part in result:
            yield from tensors_in(part)


def test_every_public_function_is_tried_with_extremes() -> None:
    functions = set(algorithms.__all__) - {"AdaptiveKL", "FixedKL"}  # two controllers of one float: their own tests
    assert set(CASES) == functions


@pytest.mark.parametrize("name", CASES)
@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_no_nan_or_infinity_comes_from_valid_input_nor_reaches_a_gradient(name: str, seed: int) -> None:
    draw = Draw(seed)
    results = list(tensors_in(CASES[name](draw)))
    assert results
    assert all(x.isfinite().all() for x in results)
    attached = [x.double().sum() for x in results if x.requires_grad]
    if attached:
        torch.stack(attached).sum().backward()
        assert all(x.grad is None or x.grad.isfinite().all() for x in draw.inputs)


# --------------------------------------------------------------------------------- masking, kl and rewards


@given(seeds)
@quick
def test_moments_of_shards_sum_to_the_whole_in_any_order_and_padding(seed: int) -> None:
    draw = Draw(seed)
    x, cut = draw.tokens().detach(), int(draw.rng.integers(0, draw.b + 1))
    wide, wide_mask = torch.nn.functional.pad(x.flip(0), (1, 2), value=NAN), torch.nn.functional.pad(draw.mask, (1, 2))
    parts = [masked_moments(x[s], draw.mask[s]) for s in (slice(0, cut), slice(cut, None))]
    others = masked_moments(wide, wide_mask.flip(0))
    largest = max(1.0, float(torch.where(draw.mask, x, 0.0).abs().sum()))
    for i, (whole, other) in enumerate(zip(masked_moments(x, draw.mask), others, strict=True)):
        tolerance = 1e-12 * largest ** max(i, 1)
        torch.testing.assert_close(parts[0][i] + parts[1][i], whole, rtol=0, atol=tolerance)
        torch.testing.assert_close(other, whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_nan_in_padding_stays_where_it_is_in_a_kl_estimate(kind: str) -> None:
    logprobs, reference = torch.tensor([[-1.0, NAN], [-2.0, -3.0]]), torch.tensor([[-2.0, NAN], [-1.5, NAN]])
    estimate = kl_estimate(logprobs, reference, kind)  # type: ignore[arg-type]
    assert estimate.isnan().tolist() == [[False, True], [False, True]]
    alone = kl_estimate(logprobs[:, :1], reference[:, :1], kind)  # type: ignore[arg-type]
    assert torch.equal(estimate[:, :1], alone)


@given(seeds)
@quick
def test_token_rewards_of_a_row_depend_on_no_other_row(seed: int) -> None:
    draw = Draw(seed)
    scores, kl, mask = draw.extreme(draw.b).detach(), draw.tokens().detach(), draw.mask
    rewards = token_rewards(scores, kl, mask, 0.1)
    assert torch.equal(token_rewards(scores.flip(0), kl.flip(0), mask.flip(0), 0.1), rewards.flip(0))
    for b in range(draw.b):
        row = slice(b, b + 1)
        assert torch.equal(token_rewards(scores[row], kl[row], mask[row], 0.1), rewards[row])


def test_token_rewards_of_no_rows_and_of_rows_without_tokens_are_empty_and_zero() -> None:
    empty = torch.zeros(2, 3, dtype=torch.bool)
    assert token_rewards(torch.zeros(0), torch.zeros(0, 3), empty[:0], 0.1).shape == (0, 3)
    rewards = token_rewards(torch.full((2,), NAN), torch.full((2, 3), NAN), empty, 0.1)
    assert rewards.tolist() == [[0.0] * 3] * 2


# ------------------------------------------------------------------------------------------------- losses


@given(seeds, st.integers(0, 6), st.sampled_from([None, 1.5]))
@quick
def test_weighted_policy_loss_of_shards_sums_to_the_whole_whatever_the_padding(
    seed: int, cut: int, dual_clip: float | None
) -> None:
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.random((int(rng.integers(0, 6)), 4)) < 0.6)
    new, old, gain, weights = (torch.from_numpy(rng.normal(size=mask.shape)).float() for _ in range(4))
    rows = [torch.where(mask, x, NAN) for x in (new, old, gain, weights.abs())]
    whole, stats = ppo_policy_loss(*rows[:3], mask, 0.2, dual_clip, rows[3])
    parts = [
        ppo_policy_loss(*(x[s] for x in rows[:3]), mask[s], 0.2, dual_clip, rows[3][s], mask.sum())
        for s in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole, rtol=1e-5, atol=1e-6)
    largest = torch.maximum(parts[0][1]["max_abs_log_ratio"], parts[1][1]["max_abs_log_ratio"])
    assert torch.equal(largest, stats["max_abs_log_ratio"])
    wide = [torch.nn.functional.pad(x.flip(0), (2, 1), value=INF) for x in rows]
    wide_mask = torch.nn.functional.pad(mask.flip(0), (2, 1))
    padded, _ = ppo_policy_loss(*wide[:3], wide_mask, 0.2, dual_clip, wide[3])
    torch.testing.assert_close(padded, whole, rtol=1e-5, atol=1e-6)


@given(seeds)
@quick
def test_names_of_prompts_and_spacing_of_ranks_change_nothing_in_the_ranking_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 12))
    scores = torch.from_numpy(rng.normal(size=n).astype(np.float32))
    ranks, prompts = torch.from_numpy(rng.integers(1, 5, n)), torch.from_numpy(rng.integers(0, 4, n))
    loss = ranking_loss(scores, ranks, prompts)
    torch.testing.assert_close(ranking_loss(scores, ranks, 100 - 7 * prompts), loss)
    torch.testing.assert_close(ranking_loss(scores, ranks.double().exp() - 2, prompts), loss)
    offset = prompts.float() * 3  # only differences within a prompt count
    torch.testing.assert_close(ranking_loss(scores + offset, ranks, prompts), loss, rtol=1e-5, atol=1e-5)


def test_a_score_of_a_response_in_no_pair_reaches_neither_loss_nor_gradient() -> None:
    scores = torch.tensor([1.0, NAN, 0.0, NAN], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([1, 1, 2, 1]), torch.tensor([0, 1, 0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(float(torch.nn.functional.softplus(torch.tensor(-1.0))))
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
