"""The circuit breaker and the waits, with a clock and a seed of the test's own."""

from __future__ import annotations

import asyncio
import random

import pytest

from rayrlhf.rewards.breaker import CircuitBreaker
from rayrlhf.rewards.retry import Retries, Trouble, full_jitter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def admitted(breaker: CircuitBreaker) -> int:
    ticket = breaker.admit()
    assert ticket is not None
    return ticket


def opened(clock: Clock) -> CircuitBreaker:
    breaker = CircuitBreaker(3, 10.0, clock)
    for _ in range(3):
        breaker.failed(admitted(breaker))
    return breaker


def test_it_opens_after_so_many_failures_in_a_row_and_a_success_begins_the_count_anew(clock: Clock) -> None:
    breaker = CircuitBreaker(3, 10.0, clock)
    for ends_well in (False, False, True, False, False):
        (breaker.succeeded if ends_well else breaker.failed)(admitted(breaker))
    assert breaker.state == "closed"
    breaker.failed(admitted(breaker))
    assert breaker.state == "open"
    assert breaker.admit() is None


def test_it_stays_open_for_the_pause_and_says_how_long_that_is(clock: Clock) -> None:
    breaker = opened(clock)
    assert breaker.wait_s() == 10.0
    clock.now += 9.5
    assert (breaker.state, breaker.wait_s(), breaker.admit()) == ("open", 0.5, None)
    clock.now += 0.5
    assert (breaker.state, breaker.wait_s()) == ("half-open", 0.0)


def test_half_open_it_lets_one_call_through_which_closes_it(clock: Clock) -> None:
    breaker = opened(clock)
    clock.now += 10
    trial = admitted(breaker)
    assert breaker.admit() is None
    breaker.succeeded(trial)
    assert breaker.state == "closed"
    breaker.failed(admitted(breaker))
    breaker.failed(admitted(breaker))
    assert breaker.state == "closed"  # counted from nothing


def test_a_trial_that_fails_opens_it_for_another_whole_pause(clock: Clock) -> None:
    breaker = opened(clock)
    clock.now += 12
    breaker.failed(admitted(breaker))
    assert (breaker.state, breaker.wait_s()) == ("open", 10.0)
    clock.now += 10
    assert breaker.admit() is not None


def test_calls_that_began_before_it_opened_neither_close_nor_prolong_it(clock: Clock) -> None:
    breaker = CircuitBreaker(2, 10.0, clock)
    early = [admitted(breaker) for _ in range(4)]
    breaker.failed(early[0])
    breaker.failed(early[1])
    clock.now += 4
    breaker.succeeded(early[2])
    breaker.failed(early[3])
    assert (breaker.state, breaker.wait_s()) == ("open", 6.0)
    clock.now += 6
    trial = admitted(breaker)
    breaker.succeeded(early[2])
    assert breaker.state == "half-open"
    breaker.succeeded(trial)
    assert breaker.state == "closed"


@pytest.mark.parametrize(("call", "highest"), [(0, 0.5), (1, 1.0), (2, 2.0), (5, 16.0), (6, 30.0), (5000, 30.0)])
def test_a_wait_is_uniform_up_to_a_bound_that_doubles_and_is_held(call: int, highest: float) -> None:
    rng = random.Random(3)
    waits = [full_jitter(call, 0.5, 30.0, rng) for _ in range(4000)]
    assert min(waits) < 0.02 * highest
    assert 0.98 * highest < max(waits) <= highest
    assert sum(waits) / len(waits) == pytest.approx(highest / 2, rel=0.05)


def test_the_same_seed_gives_the_same_waits_and_another_seed_others() -> None:
    def waits(seed: int) -> list[float]:
        rng = random.Random(seed)
        return [full_jitter(call, 0.5, 30.0, rng) for call in range(4)]

    assert waits(7) == waits(7)
    assert waits(7) != waits(8)


def test_a_call_is_made_again_until_it_succeeds_and_the_service_may_ask_for_a_longer_wait() -> None:
    slept, ends = list[float](), [Trouble("a"), Trouble("b", wait_s=9.0), "well"]

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def call() -> str:
        end = ends.pop(0)
        if isinstance(end, Trouble):
            raise end
        return end

    assert asyncio.run(Retries(5, 1.0, 30.0, random.Random(0), sleep).run(call)) == "well"
    assert slept == [random.Random(0).uniform(0, 1.0), 9.0]


@pytest.mark.parametrize(
    ("trouble", "further", "reason", "calls"),
    [
        (Trouble("late"), 2, "late after 3 tries", 3),
        (Trouble("late"), 0, "late", 1),
        (Trouble("no", again=False), 2, "no", 1),
        (Trouble("busy", wait_s=31.0), 2, "busy, and asks for a longer wait than max_wait_s", 1),
    ],
)
def test_the_last_reason_comes_through_with_the_number_of_tries(
    trouble: Trouble, further: int, reason: str, calls: int
) -> None:
    made = 0

    async def call() -> None:
        nonlocal made
        made += 1
        raise trouble

    async def sleep(seconds: float) -> None:
        pass

    with pytest.raises(Trouble) as caught:
        asyncio.run(Retries(further, 1.0, 30.0, random.Random(0), sleep).run(call))
    assert (caught.value.reason, made) == (reason, calls)
