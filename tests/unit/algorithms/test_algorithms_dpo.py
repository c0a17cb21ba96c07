"""The DPO loss against hand-worked numbers and a float64 loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms import dpo_loss

seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=30, deadline=None)


def random_pairs(seed: int) -> list[Tensor]:
    """Return the four [B] arrays: log-probs summed over responses of some ten tokens."""
    rng = np.random.default_rng(seed)
    b = int(rng.integers(0, 7))
    return [torch.from_numpy(rng.normal(-20, 5, b).astype(np.float32)) for _ in range(4)]


def oracle(pairs: list[Tensor], beta: float) -> float:
    losses = []
    for chosen, rejected, ref_chosen, ref_rejected in zip(*(x.double().tolist() for x in pairs), strict=True):
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        losses.append(max(-margin, 0.0) + math.log1p(math.exp(-abs(margin))))
    return sum(losses) / len(losses) if losses else 0.0


def test_margins_of_log_three_and_minus_log_three_by_hand() -> None:
    # chosen gains log 9, rejected gains log 3: sigmoid(log 3) = 3/4; and the other way around: 1/4
    log3 = math.log(3)
    chosen, rejected = torch.tensor([-5 + 2 * log3, -4 + log3]), torch.tensor([-7 + log3, -9 + 2 * log3])
    references = torch.tensor([-5.0, -4.0]), torch.tensor([-7.0, -9.0])
    expected = -(math.log(3 / 4) + math.log(1 / 4)) / 2
    assert dpo_loss(chosen, rejected, *references, beta=1.0).item() == pytest.approx(expected, rel=1e-6)
    # half the strength on the first pair: sigmoid(log(3) / 2) = sqrt(3) / (1 + sqrt(3))
    half = dpo_loss(chosen[:1], rejected[:1], references[0][:1], references[1][:1], beta=0.5)
    assert half.item() == pytest.approx(-math.log(math.sqrt(3) / (1 + math.sqrt(3))), rel=1e-6)


@given(seeds, st.sampled_from([0.01, 0.1, 5.0]))
@quick
def test_a_policy_equal_to_its_reference_loses_log_two_exactly(seed: int, beta: float) -> None:
    chosen, rejected, *_ = random_pairs(seed)
    if len(chosen):
        assert dpo_loss(chosen, rejected, chosen, rejected, beta).item() == pytest.approx(math.log(2), rel=1e-7)


def test_beta_is_a_tenth_by_default() -> None:
    pairs = random_pairs(1)
    assert torch.equal(dpo_loss(*pairs), dpo_loss(*pairs, beta=0.1))


@given(seeds, st.sampled_from([0.1, 1.0]))
@quick
def test_dpo_matches_a_loop_in_any_order_of_pairs(seed: int, beta: float) -> None:
    pairs = random_pairs(seed)
    expected = oracle(pairs, beta)
    assert dpo_loss(*pairs, beta).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(pairs[0])))
    assert dpo_loss(*(x[order] for x in pairs), beta).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(seeds)
@quick
def test_what_both_responses_gain_alike_changes_nothing(seed: int) -> None:
    chosen, rejected, *references = (x.double() for x in random_pairs(seed))
    loss = dpo_loss(chosen + 3.0, rejected + 3.0, *references)
    torch.testing.assert_close(loss, dpo_loss(chosen, rejected, *references))


@given(seeds, st.integers(0, 6))
@quick
def test_loss_and_gradient_of_shards_sum_to_the_whole(seed: int, cut: int) -> None:
    pairs = random_pairs(seed)
    pairs[0].requires_grad_()
    whole = dpo_loss(*pairs)
    (gradient,) = torch.autograd.grad(whole, pairs[0])
    total = sum(dpo_loss(*(x[s] for x in pairs), denominator=len(pairs[0])) for s in (slice(0, cut), slice(cut, None)))
    assert isinstance(total, Tensor)
    (summed,) = torch.autograd.grad(total, pairs[0])
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(summed, gradient, rtol=1e-5, atol=1e-6)


def test_only_the_policy_gets_a_gradient_and_it_raises_the_chosen_response() -> None:
    rows = [torch.zeros(2, requires_grad=True) for _ in range(4)]
    dpo_loss(*rows, beta=0.2).backward()
    # d/dx -log sigmoid(beta x) at 0 is -beta / 2, over two pairs
    torch.testing.assert_close(rows[0].grad, torch.tensor([-0.05, -0.05]))
    torch.testing.assert_close(rows[1].grad, torch.tensor([0.05, 0.05]))
    assert rows[2].grad is None
    assert rows[3].grad is None


@pytest.mark.parametrize("gap", [1e4, -1e4, 1e30, -1e30])
def test_extreme_margins_stay_finite_with_finite_gradients(gap: float) -> None:
    chosen, zeros = torch.tensor([gap, 0.0], requires_grad=True), torch.zeros(2)
    loss = dpo_loss(chosen, zeros, zeros, zeros)
    loss.backward()
    expected = (max(-0.1 * gap, 0.0) + math.log(2)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert chosen.grad is not None
    torch.testing.assert_close(chosen.grad, torch.tensor([0.0 if gap > 0 else -0.05, -0.025]))


@pytest.mark.parametrize("denominator", [None, 0, torch.tensor(7)])
def test_no_pairs_give_zero_with_a_zero_gradient(denominator: Tensor | None) -> None:
    weight = torch.ones((), requires_grad=True)
    loss = dpo_loss(*(weight * torch.zeros(0) for _ in range(4)), denominator=denominator)
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad is not None
    assert weight.grad.item() == 0.0


def test_half_precision_is_subtracted_in_float32() -> None:
    assert dpo_loss(*(torch.zeros(3, dtype=torch.bfloat16) for _ in range(4))).dtype == torch.float32


def test_dpo_gradients_agree_with_finite_differences() -> None:
    rows = [torch.tensor(x, dtype=torch.float64) for x in ([-3.0, -8.0], [-5.0, -2.0], [-4.0, -6.0], [-1.0, -3.0])]
    for row in rows[:2]:
        row.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: dpo_loss(c, r, *rows[2:]), tuple(rows[:2]))


def test_logprobs_per_token_or_of_unequal_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        dpo_loss(*(torch.zeros(2, 3) for _ in range(4)))
    with pytest.raises(ValueError, match="one shape"):
        dpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(1))
