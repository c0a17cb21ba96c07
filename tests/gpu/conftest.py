"""Tests for a machine with one GPU or more; collected everywhere, skipped with the reason where there is none."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests.gpu import runs

PATIENCE_S = 500.0


@pytest.fixture(scope="session", autouse=True)
def _a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def world() -> int:
    """One process a GPU, up to eight."""
    return min(torch.cuda.device_count(), 8)


@pytest.fixture(scope="session")
def found(world: int, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of one NCCL process group found, by the names of `runs`."""
    folder = tmp_path_factory.mktemp("gpu")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = mp.spawn(runs.work, args=(world, port, str(folder)), nprocs=world, join=False)
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not ranks.join(timeout=1.0):
            assert time.monotonic() < deadline, "a rank hangs"
    finally:
        for process in ranks.processes:
            process.kill()
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]
