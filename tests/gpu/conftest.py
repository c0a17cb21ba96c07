"""Tests for a machine with one GPU or more; collected everywhere, skipped with the reason where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import runs
from tests.ranks import run_ranks

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
    run_ranks(runs.work, world, folder, PATIENCE_S)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]
