"""A process group of a test's own: one process a rank, and none left behind, whatever happens."""

from __future__ import annotations

import socket
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
    ranks = mp.spawn(work, args=(world, port, str(folder)), nprocs=world, join=False)
    deadline = time.monotonic() + patience_s
    try:
        while not ranks.join(timeout=1.0):
            assert time.monotonic() < deadline, "a rank hangs"
    finally:
        for process in ranks.processes:
            process.kill()
