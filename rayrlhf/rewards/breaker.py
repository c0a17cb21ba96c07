"""A circuit breaker: a service that keeps failing is left alone for a while, then tried with one call.

              failures in a row                     pause is over
    closed ─────────────────────► open ◄──────────────────────────► half-open ──── the one call ends well ───► closed
                                   ▲                                    │
                                   └────────── it fails ────────────────┘

Pure: the clock is passed in, and calls only say how they ended. (Nygard, Release It!, 2007, section 5.2.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

__all__ = ["CircuitBreaker"]


class CircuitBreaker:
    def __init__(self, failures: int, pause_s: float, clock: Callable[[], float]) -> None:
        """Open after `failures` in a row, for `pause_s` of `clock`'s seconds."""
        self._limit = failures
        self._pause = pause_s
        self._clock = clock
        self._failures = 0
        self._opened_at: float | None = None
        self._trial = False
        self._era = 0
        """counts changes of state: how a call ended that began in an earlier one says nothing of this one"""

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        if self._opened_at is None:
            return "closed"
        return "open" if self.wait_s() > 0 else "half-open"

    def wait_s(self) -> float:
        """Seconds until a call may be tried again; 0 unless open."""
        return 0.0 if self._opened_at is None else max(0.0, self._opened_at + self._pause - self._clock())

    def admit(self) -> int | None:
        """A ticket for one call, to be given back with `succeeded` or `failed`; None: make no call now."""
        if self.state == "open" or (self.state == "half-open" and self._trial):
            return None
        self._trial = self.state == "half-open"
        return self._era

    def succeeded(self, ticket: int) -> None:
        if ticket == self._era:
            if self._opened_at is not None:
                self._change(None)
            self._failures = 0

    def failed(self, ticket: int) -> None:
        if ticket != self._era:
            return
        self._failures += 1
        if self._trial or self._failures >= self._limit:
            self._change(self._clock())

    def _change(self, opened_at: float | None) -> None:
        self._opened_at, self._trial = opened_at, False
        self._era += 1
