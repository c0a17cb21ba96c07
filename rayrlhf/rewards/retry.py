"""A call that failed is made again, after a random wait that grows."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from rayrlhf.config.rewards import RewardSourceConfig

__all__ = ["Retries", "Trouble", "full_jitter"]

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[object]]


class Trouble(Exception):
    """A call came to nothing."""

    def __init__(self, reason: str, again: bool = True, wait_s: float = 0.0) -> None:
        """
        Args:
            again: whether another call may fare better.
            wait_s: the least that is to pass before it.
        """
        super().__init__(reason)
        self.reason = reason
        self.again = again
        self.wait_s = wait_s


def full_jitter(call: int, base_s: float, longest_s: float, rng: random.Random) -> float:
    """Seconds to wait after the `call`-th failure, from 0: uniform in [0, min(longest, base * 2^call)].

    Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: of several callers that fail at once
    none comes back at the same time as another.
    """
    return rng.uniform(0.0, min(longest_s, base_s * 2.0 ** min(call, 64)))


@dataclass(frozen=True)
class Retries:
    """How often, and after which waits."""

    further: int
    base_s: float
    longest_s: float
    rng: random.Random
    sleep: Sleep = asyncio.sleep

    @classmethod
    def of(cls, config: RewardSourceConfig, seed: int, sleep: Sleep = asyncio.sleep) -> Retries:
        return cls(config.retries, config.backoff_s, config.max_wait_s, random.Random(seed), sleep)

    async def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """What the first call that succeeds gives.

        Raises:
            Trouble: the last call's, with how many were made.
        """
        for number in range(self.further + 1):
            try:
                return await call()
            except Trouble as trouble:
                if trouble.again and number < self.further and trouble.wait_s <= self.longest_s:
                    wait = full_jitter(number, self.base_s, self.longest_s, self.rng)
                    await self.sleep(max(wait, trouble.wait_s))
                    continue
                too_long = ", and asks for a longer wait than max_wait_s" if trouble.wait_s > self.longest_s else ""
                tries = f" after {number + 1} tries" if number else ""
                raise Trouble(f"{trouble.reason}{tries}{too_long}") from None
        raise AssertionError("the last call returns or raises")
