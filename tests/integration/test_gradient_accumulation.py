"""A step of many micro-batches in bfloat16: what each adds may be below bfloat16's resolution, and still counts."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.learners import learner_settings
from tests.ranks import run_ranks

pytestmark = pytest.mark.integration

MICRO_BATCHES, WIDTH = 512, 8


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, batch: Tensor) -> Tensor:
        return self.layer(batch)


def work(rank: int, world: int, port: int, folder: str) -> None:
    from rayrlhf.engines.deepspeed import Learner
    from rayrlhf.engines.distributed import Rendezvous, join_process_group

    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cpu", 1, deterministic=True))
    gc.freeze()  # ZeRO-3 collects garbage when it starts: without this, two thirds of the time goes there
    norms = {}
    for stage in range(4):
        learner = Learner(Linear(), learner_settings(stage, dtype="bfloat16", grad_clip=0.0))
        batches = [torch.ones(1, WIDTH, dtype=torch.bfloat16)] * MICRO_BATCHES
        found = learner.train_step(
            lambda module, batch: module(batch).float().sum() / MICRO_BATCHES, batches, batches[0], 1e-3
        )
        norms[stage] = found["grad_norm"]
    torch.save(norms, Path(folder) / "norms.pt")


def test_the_gradient_of_many_micro_batches_is_their_sum(tmp_path: Path) -> None:
    run_ranks(work, 1, tmp_path, patience_s=120.0)
    norms = torch.load(tmp_path / "norms.pt")
    # The loss is the mean over equal rows of the sum of the weights: its gradient is 1 for each of them.
    assert norms == pytest.approx(dict.fromkeys(range(4), WIDTH**0.5), rel=1e-3)
