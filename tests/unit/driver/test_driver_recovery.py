"""Health and deadlines: pure state, a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.driver.recovery import Budget, Deadlines, Health


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def health(clock: Clock, max_restarts: int = 3, window_s: float = 100.0, backoff_s: float = 2.0) -> Health:
    return Health(Budget(max_restarts, window_s, backoff_s), clock)


def restart(subject: Health) -> float | None:
    wait = subject.failed()
    if wait is not None:
        subject.starting()
        subject.serving()
    return wait


def test_each_restart_within_the_window_waits_twice_as_long_and_the_fourth_failure_is_the_end():
    subject = health(Clock())
    assert [restart(subject) for _ in range(4)] == [2.0, 4.0, 8.0, None]
    assert subject.state == "spent"


def test_failures_that_are_long_past_count_no_more():
    clock = Clock()
    subject = health(clock)
    for now, wait in ((0.0, 2.0), (50.0, 4.0), (99.0, 8.0), (149.0, 8.0), (250.0, 2.0)):
        clock.now = now
        assert restart(subject) == wait


def test_a_restart_that_fails_itself_counts_as_another_failure():
    subject = health(Clock(), max_restarts=2)
    assert subject.failed() == 2.0
    subject.starting()
    assert subject.failed() == 4.0
    subject.starting()
    assert subject.failed() is None


def test_without_restarts_the_first_failure_is_the_end():
    assert health(Clock(), max_restarts=0).failed() is None


@pytest.mark.parametrize("call", ["starting", "serving"])
def test_a_role_that_serves_cannot_come_back(call: str):
    with pytest.raises(ValueError, match="it should be"):
        getattr(health(Clock()), call)()


def test_a_role_that_is_spent_cannot_fail_again():
    subject = health(Clock(), max_restarts=0)
    subject.failed()
    with pytest.raises(ValueError, match="spent"):
        subject.failed()


@given(st.lists(st.floats(0, 60), max_size=60), st.integers(0, 5))
def test_no_window_ever_has_more_restarts_than_are_allowed(gaps: list[float], allowed: int):
    clock = Clock()
    subject, restarts = health(clock, allowed), list[float]()
    for gap in gaps:
        clock.now += gap
        if restart(subject) is None:
            break
        restarts.append(clock.now)
    for at in restarts:
        assert sum(at <= t < at + 100.0 for t in restarts) <= allowed


def test_a_call_may_take_ten_times_as_long_as_the_longest_of_its_kind_but_a_minute_at_least_and_the_cap_at_most():
    deadlines = Deadlines(floor_s=60.0, factor=10.0, cap_s=1800.0)
    assert deadlines.of("update") == 1800.0
    deadlines.took("update", 0.5)
    assert deadlines.of("update") == 60.0
    deadlines.took("update", 9.0)
    deadlines.took("update", 3.0)
    assert deadlines.of("update") == 90.0
    deadlines.took("update", 500.0)
    assert deadlines.of("update") == 1800.0
    assert deadlines.of("score") == 1800.0
