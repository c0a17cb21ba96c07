"""Runs that are ended from outside: a command that was started, the moment to end it, and what it leaves running."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tests.integration.conftest import COMMAND, ROOT

__all__ = ["Started", "worker_of"]


class Started:
    """A command as a user starts it; nothing of it is left at the end."""

    def __init__(self, *arguments: str, output: Path | None = None) -> None:
        """`output`: where what it prints goes; nowhere if left out."""
        self._arguments, self._output = arguments, output

    def __enter__(self) -> Started:
        with open(self._output or os.devnull, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [*COMMAND, *self._arguments],
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_API_KEY": ""},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        _end_orphans(self.process.pid)

    def wait_for(self, moment: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not moment():
            assert self.process.poll() is None, "the run ended before it could be ended"
            assert time.monotonic() < deadline, "the run does not get there"
            time.sleep(0.02)


def worker_of(log: Path) -> int:
    """The process id of the actor that prints into this file."""
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if os.readlink(link) == str(log):
                return int(link.parts[2])
        except OSError:
            continue
    raise AssertionError(f"no process prints into {log}")


def _end_orphans(session: int) -> None:
    """Ray's processes live on without their driver for a while; they are of its session."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                os.kill(int(status.parent.name), signal.SIGKILL)
        except (OSError, IndexError):
            continue
