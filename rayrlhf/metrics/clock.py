"""Seconds per phase of each step, and a Chrome trace of them (chrome://tracing, Perfetto)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import IO

__all__ = ["PHASES", "StepClock"]

PHASES = ("generate", "score", "estimate", "update", "publish", "save")


class StepClock:
    """Times the phases of a step; what lies between them is `time/other_s`."""

    def __init__(self, trace: Path, on_phase: Callable[[str], None] = lambda name: None) -> None:
        """The trace grows as the run does; `on_phase` hears the name of each phase as it begins."""
        self._on_phase = on_phase
        self._trace: IO[str] = open(trace, "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._separator = "[\n"
        self._origin = perf_counter()
        self._step_start = self._origin
        self._seconds: dict[str, float] = {}

    def start_step(self) -> None:
        self._step_start = perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = perf_counter()
        self._on_phase(name)
        try:
            yield
        finally:
            seconds = perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
            self._event(name, start, seconds, tid=1)

    @contextmanager
    def background(self, name: str) -> Iterator[None]:
        """What runs beside the step's phases: in the trace, and in no step's sum."""
        start = perf_counter()
        try:
            yield
        finally:
            self._event(name, start, perf_counter() - start, tid=2)

    def end_step(self) -> dict[str, float]:
        """time/*_s of the step."""
        total = perf_counter() - self._step_start
        self._event("step", self._step_start, total, tid=0)
        times = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        times["time/other_s"] = total - sum(self._seconds.values())
        times["time/step_s"] = total
        return times

    def close(self) -> None:
        """End the trace; viewers read one that was cut off too."""
        self._trace.write("\n]\n" if self._separator == ",\n" else "[]\n")
        self._trace.close()

    def _event(self, name: str, start: float, seconds: float, tid: int) -> None:
        microseconds = 1e6
        event = {
            "name": name,
            "ph": "X",
            "pid": 0,
            "tid": tid,
            "ts": (start - self._origin) * microseconds,
            "dur": seconds * microseconds,
        }
        self._trace.write(self._separator + json.dumps(event))
        self._separator = ",\n"
