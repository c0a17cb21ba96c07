"""What every stage gets: the config, the data, the run's folder and sinks, and Ray once somebody needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from rayrlhf.actors.cluster import connect, disconnect, end_own_ray
from rayrlhf.actors.group import KeptActors
from rayrlhf.actors.head import HeadWatch
from rayrlhf.config import Config
from rayrlhf.metrics.sinks import RunSink
from rayrlhf.stages.datasets import Datasets

__all__ = ["StageContext"]


@dataclass
class StageContext:
    config: Config
    data: Datasets
    folder: Path
    """of the run: logs, metrics, model"""
    sink: RunSink
    console: Console
    resume: bool = False
    """Go on from the newest checkpoint."""
    verify_step: int | None = None
    """The PPO step, counted from 1, that is compared with the reference trainer."""
    inputs: Mapping[str, Any] = field(default_factory=dict, init=False)
    """All that goes into the stage under way, as its artifact names it."""
    asked_to_end: bool = field(default=False, init=False)
    """SIGTERM came too late for the stage under way to stop: no other one begins."""
    kept: KeptActors = field(default_factory=KeptActors, init=False)
    """Actors between two stages that sample."""
    head_lost: bool = field(default=False, init=False)
    """Who asks Ray's head for anything waits until this process is ended."""
    on_head_lost: Callable[[], object] | None = field(default=None, init=False)
    """Called from another thread, by whoever can save something."""
    _head: HeadWatch | None = field(default=None, init=False)
    """there is one once Ray is"""

    def ensure_ray(self) -> None:
        """Start or join Ray, once, and check that it has what the config asks for."""
        if self._head is None:
            connect(self.config)
            self._head = HeadWatch(self._lose_head)

    def close(self) -> None:
        try:
            if self.head_lost:
                end_own_ray()
                return
            self.kept.close()
            if self._head:  # first: wandb may take its time, and Ctrl-C promises that the actors go
                self._head.stop()
                disconnect()
        finally:
            self.sink.close()

    def _lose_head(self, text: str) -> None:
        self.head_lost = True
        self.console.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
        if self.on_head_lost:
            with suppress(RuntimeError):  # its loop ends at this very moment
                self.on_head_lost()

    def log(self, name: str) -> str:
        """Path of an actor's log file."""
        return str((self.folder / "logs" / f"{name}.log").resolve())
