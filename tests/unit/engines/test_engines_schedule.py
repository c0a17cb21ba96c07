"""Learning rates at known steps."""

import pytest

from rayrlhf.engines.schedule import cosine_with_warmup, linear_warmup


def test_a_cosine_falls_from_the_peak_to_a_tenth_at_the_last_step():
    rates = [cosine_with_warmup(step, 11, 2.0, 0, 0.1) for step in range(11)]
    assert rates[0] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    # half-way the cosine is 0: the mean of 2 and 0.2
    assert rates[5] == pytest.approx(1.1)
    # three tenths of the way: 0.2 + 1.8 * (1 + cos 54 deg) / 2
    assert rates[3] == pytest.approx(0.2 + 0.9 * (1 + 0.5877852523))
    assert rates == sorted(rates, reverse=True)


def test_warm_up_rises_in_equal_steps_and_is_never_zero():
    rates = [cosine_with_warmup(step, 20, 1.0, 4, 0.1) for step in range(6)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] < 1.0
    assert cosine_with_warmup(19, 20, 1.0, 4, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_very_short_runs_have_a_rate_at_every_step(total):
    for warmup in range(total + 1):
        for step in range(total):
            assert 0.1 - 1e-12 <= cosine_with_warmup(step, total, 1.0, warmup, 0.1) <= 1.0


def test_steps_past_the_end_stay_at_the_final_rate():
    assert cosine_with_warmup(99, 10, 1.0, 0, 0.1) == pytest.approx(0.1)


def test_a_linear_warm_up_starts_at_a_tenth_and_stays_at_the_peak():
    rates = [linear_warmup(step, 9e-6, 10) for step in (0, 1, 5, 9, 10, 11, 10_000)]
    assert rates == pytest.approx([9e-7, 1.71e-6, 4.95e-6, 8.19e-6, 9e-6, 9e-6, 9e-6], rel=1e-12)


def test_no_warm_up_is_the_peak_from_the_first_step():
    assert linear_warmup(0, 5.0, 0) == 5.0
    assert cosine_with_warmup(0, 10, 5.0, 0, 0.1) == 5.0
