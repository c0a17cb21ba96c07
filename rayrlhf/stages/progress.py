"""What a person sees while a stage runs: its phase, its newest numbers, a bar and an ETA."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["StageProgress"]

# Without a terminal (CI, a log file) a line each so many seconds takes the bar's place.
LINE_EVERY_S = 15.0


class StageProgress:
    """A live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, stage: str) -> None:
        self._console = console
        self._stage = stage
        self._phase, self._numbers = "preparing", ""
        self._done, self._total = 0, 0
        self._start = self._last_line = monotonic()
        self._first: tuple[float, int] | None = None
        """When the first step was heard of, and its number: what came before is no guide to what is left."""
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.fields[stage]:<9}"),
                TextColumn("{task.fields[phase]:<11}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )
            self._task = self._bar.add_task("", total=None, stage=stage, phase=self._phase, numbers="")

    def __enter__(self) -> StageProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def phase(self, name: str) -> None:
        self._phase = name
        if self._bar:
            self._bar.update(self._task, phase=name)

    def step(self, done: int, total: int, numbers: Mapping[str, float], arm: str | None = None) -> None:
        """`done` of `total` steps are over; `numbers` are shown as they are named, after the `arm` they belong to."""
        if done < self._done:
            self._first = None  # another arm begins
        self._done, self._total = done, total
        self._first = self._first or (monotonic(), done)
        named = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self._numbers = f"{arm}: {named}" if arm else named
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, numbers=self._numbers)
        elif monotonic() - self._last_line >= LINE_EVERY_S or done == total:
            self._line()

    def _line(self) -> None:
        self._last_line = monotonic()
        elapsed = self._last_line - self._start
        since, first = self._first or (self._start, 0)
        pace = (self._last_line - since) / (self._done - first) if self._done > first else None
        eta = "?" if pace is None else f"{pace * (self._total - self._done):.0f}s"
        self._console.print(
            f"{self._stage:<9} {self._done}/{self._total}  {elapsed:.0f}s, eta {eta}  {self._numbers}",
            highlight=False,
        )
