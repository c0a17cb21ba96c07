"""Where the score and the KL penalty land."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms import token_rewards, treat_truncated

NAN = float("nan")
quick = settings(max_examples=30, deadline=None)


def oracle(scores: np.ndarray, kl: np.ndarray, mask: np.ndarray, coef: float) -> np.ndarray:
    rewards = np.zeros(kl.shape)
    for b, row in enumerate(mask):
        for t in np.flatnonzero(row):
            rewards[b, t] = -coef * float(kl[b, t])
        if row.any():
            rewards[b, np.flatnonzero(row).max()] += float(scores[b])
    return rewards


def test_the_score_is_added_at_the_last_valid_token_and_kl_is_paid_at_each() -> None:
    scores = torch.tensor([1.0, -2.0, NAN])
    kl = torch.tensor([[0.5, -1.0, NAN], [2.0, 0.0, 1.0], [NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    expected = torch.tensor([[-0.05, 1.1, 0.0], [-0.2, 0.0, -2.1], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(token_rewards(scores, kl, mask, 0.1), expected)


def test_a_row_of_one_token_gets_both() -> None:
    rewards = token_rewards(torch.tensor([3.0]), torch.tensor([[2.0]]), torch.tensor([[True]]), 0.5)
    assert rewards.tolist() == [[2.0]]


@given(st.integers(0, 2**32 - 1))
@quick
def test_rewards_match_a_loop_and_padding_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    b, r = int(rng.integers(1, 5)), int(rng.integers(1, 7))
    scores, kl = rng.normal(size=b).astype(np.float32), rng.normal(size=(b, r)).astype(np.float32)
    mask = np.arange(r) < rng.integers(0, r + 1, (b, 1))
    kl[~mask] = NAN
    rewards = token_rewards(*map(torch.from_numpy, (scores, kl, mask)), 0.02)
    np.testing.assert_allclose(rewards.numpy(), oracle(scores, kl, mask, 0.02), rtol=1e-6, atol=1e-7)
    wide_kl = np.pad(kl, ((0, 0), (2, 3)), constant_values=NAN)
    wide_mask = np.pad(mask, ((0, 0), (2, 3)))
    wide = token_rewards(*map(torch.from_numpy, (scores, wide_kl, wide_mask)), 0.02)
    assert torch.equal(wide[:, 2 : 2 + r], rewards)
    assert not wide[:, :2].any()
    assert not wide[:, 2 + r :].any()


def test_no_response_positions_give_an_empty_result() -> None:
    rewards = token_rewards(torch.ones(2), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), 0.1)
    assert rewards.shape == (2, 0)


def test_scores_that_do_not_fit_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores of shape \(2,\)"):
        token_rewards(torch.ones(1), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.1)


@pytest.mark.parametrize(
    ("treatment", "expected"),
    [
        ("keep", [1.0, -2.0, 3.0]),
        ("mask", [1.0, -2.0, 3.0]),
        ("penalty", [1.0, -2.5, 2.5]),
        ("replace", [1.0, 0.5, 0.5]),
    ],
)
def test_the_score_of_a_cut_response_is_kept_lowered_or_replaced(treatment, expected) -> None:
    scores, cut = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([False, True, True])
    assert treat_truncated(scores, cut, treatment, 0.5).tolist() == expected


def test_an_unknown_treatment_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'keep', 'penalty', 'replace' or 'mask'"):
        treat_truncated(torch.zeros(1), torch.ones(1, dtype=torch.bool), "drop", 1.0)
