"""Faults that are injected for real: a running command, its actors' processes, and signals sent in a named phase."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

__all__ = [
    "ROOT",
    "actor",
    "end_session",
    "kill_in_next_call",
    "recoveries",
    "send_within",
    "session",
    "started",
    "wait_until",
    "writer_of",
]

ROOT = Path(__file__).parents[1]
# A run whose actor has stopped asks it for something within this time.
ASKED_S = 2.0


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`rayrlhf COMMAND ...` in a session of its own, which ends with the block, whatever is left of it."""
    with (
        open(log, "ab") as output,
        subprocess.Popen(
            [sys.executable, "-m", "rayrlhf.cli", *command],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()
            end_session(process.pid)


def session(leader: int) -> list[int]:
    """The processes of a session; zombies are none."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(status.parent.name))
    return found


def end_session(leader: int) -> None:
    """Ray's processes live on without their driver for a while; they are of its session."""
    for pid in session(leader):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def actor(driver: int, name: str) -> psutil.Process | None:
    """The process of an actor of this class: Ray writes that, and the method it is in, over its command line."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.NoSuchProcess, IndexError):
                if child.cmdline()[0].startswith(f"ray::{name}"):
                    return child
    return None


def writer_of(log: Path) -> int:
    """The process whose output goes into this file, as each actor's does."""
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):
            if os.readlink(link) == str(log):
                return int(link.parts[2])
    raise AssertionError(f"no process writes {log}")


def send_within(driver: int, name: str, method: str, how: signal.Signals, timeout_s: float = 300) -> int:
    """Send the signal while the actor is in the method, as its own process says just before; returns its number."""
    deadline = time.monotonic() + timeout_s
    title = f"ray::{name}.{method}".encode()
    while time.monotonic() < deadline:
        found = actor(driver, name)
        with suppress(OSError):
            for _ in range(2000 if found else 0):
                if Path(f"/proc/{found.pid}/cmdline").read_bytes().startswith(title):  # type: ignore[union-attr]
                    os.kill(found.pid, how)  # type: ignore[union-attr]
                    return found.pid  # type: ignore[union-attr]
                time.sleep(0.001)
        assert Path(f"/proc/{driver}/exe").exists(), "the run ended before"
    raise AssertionError(f"{name} is never in {method}")


def kill_in_next_call(driver: int, name: str, timeout_s: float = 300) -> None:
    """Stop the actor where it is, let the run ask something of it, and kill it: what was asked is in the run's records.

    For calls that are over too soon to be met by `send_within`.
    """
    deadline = time.monotonic() + timeout_s
    while (found := actor(driver, name)) is None:
        assert time.monotonic() < deadline, f"there is no {name}"
        time.sleep(0.05)
    found.send_signal(signal.SIGSTOP)
    time.sleep(ASKED_S)
    found.kill()


def recoveries(folder: Path) -> list[dict[str, Any]]:
    path = folder / "recoveries.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(true: Callable[[], Any], process: subprocess.Popen[bytes], timeout_s: float = 300) -> None:
    """Of a run that goes on meanwhile."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert process.poll() is None, f"the run ended with {process.returncode}"
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)
