"""Who may be replaced, how soon and how often, and how long a call may take. Pure: the clock is handed in.

serving ── failed ──► waiting ── starting ──► starting ── serving ──► serving
             │                                    │
             └── too often within the window ◄────┘ failed
             ▼
           spent
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Budget", "Deadlines", "Health", "State"]

State = Literal["serving", "waiting", "starting", "spent"]


@dataclass(frozen=True, slots=True)
class Budget:
    """See `RecoveryConfig`."""

    max_restarts: int
    window_s: float
    backoff_s: float


class Health:
    """Of one role, or of one engine: from failure to failure."""

    def __init__(self, budget: Budget, clock: Callable[[], float]) -> None:
        self.state: State = "serving"
        self._budget = budget
        self._clock = clock
        self._failures: list[float] = []

    @property
    def failures(self) -> int:
        """within the window"""
        return len(self._failures)

    def failed(self) -> float | None:
        """Seconds to wait before the restart, twice as many as before the last one; None when there is to be none."""
        self._must_be("serving", "starting")
        now = self._clock()
        self._failures = [t for t in self._failures if now - t < self._budget.window_s] + [now]
        if len(self._failures) > self._budget.max_restarts:
            self.state = "spent"
            return None
        self.state = "waiting"
        return self._budget.backoff_s * float(2 ** (len(self._failures) - 1))

    def starting(self) -> None:
        self._must_be("waiting")
        self.state = "starting"

    def serving(self) -> None:
        self._must_be("starting")
        self.state = "serving"

    def _must_be(self, *states: State) -> None:
        if self.state not in states:
            raise ValueError(f"{self.state}, and it should be {' or '.join(states)}")


class Deadlines:
    """How long a call may take before it counts as hanging, learned from those that came back."""

    def __init__(self, floor_s: float, factor: float, cap_s: float) -> None:
        """`cap_s`: for a call of a kind that has not come back yet, and for every other too."""
        self._floor_s, self._factor, self._cap_s = floor_s, factor, cap_s
        self._longest: dict[str, float] = {}

    def of(self, method: str) -> float:
        if method not in self._longest:
            return self._cap_s
        return min(self._cap_s, max(self._floor_s, self._factor * self._longest[method]))

    def took(self, method: str, seconds: float) -> None:
        self._longest[method] = max(seconds, self._longest.get(method, 0.0))
