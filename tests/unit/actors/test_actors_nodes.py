"""A process seen from outside: where it is stuck, and its end."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from rayrlhf.actors.base import Whereabouts, segments_of
from rayrlhf.actors.nodes import _end, _show_stack, innermost_frames

DUMP = """
(MainProcess pid=7) INFO some line of its log
Thread 0x00007f0001 (most recent call first):
  File "threading.py", line 331 in wait
  File "threading.py", line 1002 in _bootstrap

Current thread 0x00007f0002 (most recent call first):
  File "pool.py", line 81 in _worker

Thread 0x00007f0003 (most recent call first):
  File "torch/distributed.py", line 5 in all_reduce
  File "learning.py", line 4 in update_policy
  File "models.py", line 3 in update
"""
STUCK = """
    import faulthandler, signal, sys, threading, time
    faulthandler.register(signal.SIGUSR2, file=open(sys.argv[1], "a"), all_threads=True)
    threading.Thread(target=lambda: threading.Event().wait(), daemon=True).start()
    def stuck_here():
        print("ready", flush=True)
        time.sleep(600)
    stuck_here()
"""


def test_the_main_thread_is_shown_newest_call_first_whichever_thread_got_the_signal():
    assert innermost_frames(DUMP, 2) == (
        'File "torch/distributed.py", line 5 in all_reduce; File "learning.py", line 4 in update_policy'
    )


def test_where_another_thread_does_our_work_it_is_that_one():
    """Ray Train runs the work beside the main thread."""
    loop = 'Thread 0x00007f0004 (most recent call first):\n  File "ray/worker.py", line 1069 in main_loop\n'
    work = 'Thread 0x00007f0005 (most recent call first):\n  File "torch/nn.py", line 1 in f\n'
    work += '  File "/site-packages/rayrlhf/supervised/loop.py", line 9 in train\n'
    assert innermost_frames(work + loop, 1) == 'File "torch/nn.py", line 1 in f'
    assert innermost_frames(loop, 1) == 'File "ray/worker.py", line 1069 in main_loop'


def test_a_log_without_a_stack_shows_none():
    assert innermost_frames("(MainProcess pid=7) INFO nothing") == ""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_that_hangs_shows_where_even_if_it_was_stopped_and_can_be_ended(tmp_path: Path, stopped: bool):
    log = tmp_path / "log"
    log.write_text("before\n")
    command = [sys.executable, "-c", textwrap.dedent(STUCK), str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            where = Whereabouts("node", process.pid, psutil.Process(process.pid).create_time(), str(log))
            if stopped:
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.1)
            assert "in stuck_here" in _show_stack(where).split("; ")[0]
            _end(where)
            assert process.wait(10) == -signal.SIGKILL
            assert _show_stack(where) == "(no stack: the process is gone)"
        finally:
            process.kill()


def test_a_process_number_that_somebody_else_has_now_is_left_alone(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        try:
            _end(Whereabouts("node", other.pid, psutil.Process(other.pid).create_time() - 100, str(tmp_path / "log")))
            time.sleep(0.2)
            assert other.poll() is None
        finally:
            other.kill()


HOLDS = """
    import mmap, sys, time
    files = [open(path, "r+b") for path in sys.argv[1:]]
    held = [mmap.mmap(file.fileno(), 4096) for file in files]
    print("ready", flush=True)
    time.sleep(600)
"""


@contextmanager
def holding(*paths: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", textwrap.dedent(HOLDS), *map(str, paths)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("died_by_itself", [False, True])
def test_shared_memory_that_a_process_leaves_is_given_back_but_not_what_others_hold_too(died_by_itself: bool):
    own, shared, rays = (
        Path(f"/dev/shm/{name}-test-{time.monotonic_ns()}") for name in ("psm_own", "vllm_both", "plasma")
    )
    for path in (own, shared, rays):
        path.write_bytes(bytes(4096))
    try:
        with holding(own, shared, rays) as process, holding(shared):
            assert segments_of(process.pid) == {str(own), str(shared)}
            started = psutil.Process(process.pid).create_time()
            where = Whereabouts("node", process.pid, started, "log", tuple(segments_of(process.pid)))
            if died_by_itself:
                process.kill()
                process.wait(10)
            _end(where)
            assert not own.exists()
            assert shared.exists()
            assert rays.exists()
    finally:
        for path in (own, shared, rays):
            path.unlink(missing_ok=True)
    assert segments_of(2**22) == set()
