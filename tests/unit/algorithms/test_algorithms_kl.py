"""KL estimators and controllers against hand-worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms import AdaptiveKL, FixedKL, kl_estimate
from rayrlhf.errors import TrainingError

quick = settings(max_examples=30, deadline=None)
LOG2 = math.log(2)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [LOG2, -LOG2, 0.0]),
        ("k2", [LOG2**2 / 2, LOG2**2 / 2, 0.0]),
        ("k3", [LOG2 - 0.5, 1 - LOG2, 0.0]),  # exp(-d) - 1 + d at d = log 2, -log 2, 0
    ],
)
def test_estimators_at_twice_half_and_equal_probability(kind: str, expected: list[float]) -> None:
    logprobs = torch.tensor([[0.5, 0.25, 0.3]]).log()
    reference = torch.tensor([[0.25, 0.5, 0.3]]).log()
    torch.testing.assert_close(kl_estimate(logprobs, reference, kind), torch.tensor([expected]))


def test_k1_is_the_default() -> None:
    assert kl_estimate(torch.tensor([-1.0]), torch.tensor([-3.0])).item() == 2.0


@given(st.integers(0, 2**32 - 1))
@quick
def test_k1_and_k3_are_unbiased_over_a_categorical(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(5) * 2), rng.dirichlet(np.ones(5) * 2)
    exact = float((p * np.log(p / q)).sum())
    for kind in ("k1", "k3"):
        estimate = kl_estimate(torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q)), kind)
        assert float((torch.from_numpy(p) * estimate).sum()) == pytest.approx(exact, abs=1e-9)


@given(st.floats(-1e4, 1e4))
@quick
def test_k2_and_k3_are_finite_and_never_negative_with_finite_gradients(gap: float) -> None:
    for kind in ("k1", "k2", "k3"):
        logprobs = torch.tensor([gap], requires_grad=True)
        estimate = kl_estimate(logprobs, torch.zeros(1), kind)
        (gradient,) = torch.autograd.grad(estimate.sum(), logprobs)
        assert estimate.isfinite().all()
        assert gradient.isfinite().all()
        assert kind == "k1" or estimate.item() >= 0


def test_k3_holds_only_the_side_that_could_overflow() -> None:
    far = kl_estimate(torch.tensor([-1e4, 1e4]), torch.zeros(2), "k3")
    torch.testing.assert_close(far, torch.tensor([math.exp(20) - 21, 9999.0]))


def test_k3_keeps_its_digits_near_zero() -> None:
    assert kl_estimate(torch.tensor([1e-3]), torch.zeros(1), "k3").item() == pytest.approx(0.5e-6, rel=1e-2)


def test_half_precision_is_subtracted_in_float32() -> None:
    assert kl_estimate(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)).dtype == torch.float32


def test_an_unknown_estimator_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'k4'; expected 'k1', 'k2' or 'k3'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


def test_a_fixed_coefficient_stays() -> None:
    controller = FixedKL(0.02)
    controller.update(100.0, 512)
    assert controller.coef == 0.02


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * 1.01),  # 10 % over, a tenth of a horizon
        (60.0, 0.1 * 1.02),  # clipped at +0.2
        (0.0, 0.1 * 0.98),  # clipped at -0.2
        (-3.0, 0.1 * 0.98),  # k1 may be negative
    ],
)
def test_adaptive_coefficient_moves_by_the_clipped_error(kl: float, expected: float) -> None:
    controller = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    controller.update(kl, 1_000)
    assert controller.coef == pytest.approx(expected, rel=1e-12)


def test_adaptive_coefficient_compounds() -> None:
    controller = AdaptiveKL(0.1, target=1.0, horizon=100)
    controller.update(2.0, 100)
    controller.update(2.0, 100)
    assert controller.coef == pytest.approx(0.144)


@pytest.mark.parametrize("kl", [float("nan"), float("inf")])
def test_a_kl_that_is_not_finite_stops_training_and_leaves_the_coefficient(kl: float) -> None:
    controller = AdaptiveKL(0.1, target=6.0, horizon=100)
    with pytest.raises(TrainingError):
        controller.update(kl, 10)
    assert controller.coef == 0.1


def test_a_step_so_long_that_the_coefficient_would_turn_negative_is_refused() -> None:
    controller = AdaptiveKL(0.1, target=6.0, horizon=100)
    with pytest.raises(TrainingError, match="horizon"):
        controller.update(0.0, 600)
    assert controller.coef == 0.1


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 100), (-1.0, 100), (6.0, 0), (float("nan"), 100)])
def test_a_target_or_horizon_that_is_not_positive_is_refused(target: float, horizon: float) -> None:
    with pytest.raises(ValueError, match="target > 0 and horizon > 0"):
        AdaptiveKL(0.1, target, horizon)
