"""What is done to an actor's process from outside, on its node: show where it is stuck, end it for good.

A process that hangs answers no call, and one that was stopped gets no signal before it goes on. A task on the same node
sends the signals; the actor's own log receives the stack.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrlhf.actors.base import SHOW_STACK, Whereabouts, segments_of

__all__ = ["clear_after", "end_process", "innermost_frames", "stack_of"]

WRITTEN_S = 2.0
# Children of a process that died by itself notice it, and end.
GONE_S = 5.0


async def stack_of(where: Whereabouts, within_s: float) -> str:
    """The innermost frames of the process's threads, as it has written them to its log; why not, if it has not."""
    try:
        return str(await _on_node(where, _show_stack, within_s))
    except Exception as error:  # the node may be gone
        return f"(no stack: {type(error).__name__})"


async def end_process(where: Whereabouts, within_s: float) -> None:
    """SIGKILL, to its children too: Ray asks a process that hangs to end, and waits for it. What shared memory it
    leaves is given back."""
    with suppress(Exception):  # the node may be gone
        await _on_node(where, _end, within_s)


def clear_after(ended: Sequence[Whereabouts], within_s: float) -> None:
    """Give back the shared memory of processes that have been ended."""
    clearing = [_asked(where, _end) for where in ended if where.segments]
    if clearing:
        ray.wait(clearing, num_returns=len(clearing), timeout=within_s)


async def _on_node(where: Whereabouts, task: object, within_s: float) -> object:
    return await asyncio.wait_for(_result(_asked(where, task)), within_s)


def _asked(where: Whereabouts, task: object) -> Any:
    strategy = NodeAffinitySchedulingStrategy(where.node, soft=False)
    return ray.remote(task).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0).remote(where)


async def _result(ref: object) -> object:
    return await ref  # type: ignore[misc]


def _show_stack(where: Whereabouts) -> str:
    process = _process(where)
    if process is None:
        return "(no stack: the process is gone)"
    log = Path(where.log)
    before = log.stat().st_size
    process.send_signal(SHOW_STACK)
    process.send_signal(signal.SIGCONT)
    deadline, written = time.monotonic() + WRITTEN_S, ""
    while time.monotonic() < deadline:
        time.sleep(0.1)
        with open(log, encoding="utf-8", errors="replace") as file:
            file.seek(before)
            now = file.read()
        if now and now == written:
            break
        written = now
    return innermost_frames(written) or "(no stack: it takes no signals)"


def innermost_frames(written: str, count: int = 4) -> str:
    """Of the thread that does our work, else of the main thread; a thread's newest call is written first.

    An actor works in its main thread, which is written last, a worker of Ray Train in another one.
    """
    threads: list[list[str]] = [[]]
    for line in map(str.strip, written.splitlines()):
        if line.startswith(("Thread 0x", "Current thread 0x")):
            threads.append([])
        elif line.startswith("File "):
            threads[-1].append(line)
    ours = [frames for frames in threads if any("/rayrlhf/" in frame for frame in frames)]
    return "; ".join((ours or threads)[-1][:count])


def _end(where: Whereabouts) -> None:
    process = _process(where)
    for one in [*process.children(recursive=True), process] if process else []:
        with suppress(psutil.NoSuchProcess):
            os.kill(one.pid, signal.SIGKILL)
    left, deadline = set(where.segments), time.monotonic() + GONE_S
    while left and time.monotonic() < deadline:
        free = left - {path for pid in psutil.pids() for path in segments_of(pid)}
        for path in free:
            Path(path).unlink(missing_ok=True)
        left -= free
        time.sleep(0.1 if left else 0)


def _process(where: Whereabouts) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(where.pid)
        if abs(process.create_time() - where.started) < 1.0:
            return process
    return None
