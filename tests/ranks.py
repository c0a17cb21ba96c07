"""A process group of a test's own: one process a rank, and none left behind, whatever happens."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing as mp

__all__ = ["run_ranks"]


def run_ranks(work: Callable[[int, int, int, str], None], world: int, folder: Path, patience_s: float) -> None:
    """`work(rank, world, port, folder)` on every rank; a rank that raises is the test's error, as is one that hangs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = mp.spawn(_rank, args=(work, world, port, str(folder)), nprocs=world, join=False)
    deadline = time.monotonic() + patience_s
    try:
        while not ranks.join(timeout=1.0):
            assert time.monotonic() < deadline, "a rank hangs"
    finally:
        for process in ranks.processes:
            process.kill()


def _rank(rank: int, work: Callable[[int, int, int, str], None], world: int, port: int, folder: str) -> None:
    faulthandler.enable()  # a rank that aborts says where
    work(rank, world, port, folder)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's end: gloo's threads are still about, and one that meets the other rank's closed
    # connection there aborts the process, with all its work done.
    os._exit(0)
