"""hpZ: the second copy of the shards, which DeepSpeed's passes gather from while it is there, is never an old one."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrlhf.config.deepspeed import DeepSpeedConfig
from rayrlhf.config.model import FromScratch
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample
from rayrlhf.models.build import from_scratch
from rayrlhf.weights.probe import ProbeRow
from tests.learners import learner_settings
from tests.ranks import run_ranks

pytestmark = pytest.mark.integration

# The model's parameters are small enough that ZeRO-3 would leave them whole.
SECTION = DeepSpeedConfig(
    zero_hpz_partition_size=2, extra={"zero_optimization": {"stage3_param_persistence_threshold": 0}}
)
Weights = dict[str, torch.Tensor]


def work(rank: int, world: int, port: int, folder: str) -> None:
    from rayrlhf.engines import deepspeed as engine
    from rayrlhf.engines.distributed import Rendezvous, join_process_group
    from rayrlhf.engines.scoring import probe_logprobs
    from rayrlhf.engines.state import load_state, save_state
    from rayrlhf.engines.tasks import LanguageTask

    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cpu", 1, deterministic=True))
    gc.freeze()  # ZeRO-3 collects garbage when it starts: without this, two thirds of the time goes there

    def learner(seed: int) -> engine.Learner:
        settings = learner_settings(3, learning_rate=1e-2, eps=1e-4, average=0.5, deepspeed=SECTION.keys())
        spec = FromScratch(vocab_size=300, hidden_size=32, layers=1, heads=2, context=64)
        return engine.Learner(from_scratch(spec, 64, 0, 1, seed=seed), settings)

    def weights(of: engine.Learner) -> Weights:
        """As they are gathered, and what a pass makes of them."""
        answers = {"answers": torch.tensor(probe_logprobs(of, [ProbeRow([5, 6, 7], [8, 9])]))}
        return answers | {n: t.clone() for bucket in of.named_buckets(of.module.lm, 2**20) for n, t in bucket}

    first = learner(seed=1)
    task = LanguageTask([LMExample(np.arange(2, 14, dtype=np.int32) + 3 * i, 0, "") for i in range(2)])
    batches, total = task.cut([rank], Cutting(40), first.device), task.denominator([0, 1])
    found: dict[str, Any] = {"made": weights(first)}
    for name in ("saved", "learned"):
        first.train_step(
            lambda module, batch: task.loss(module, batch, total), batches, task.dummy(first.device), learning_rate=1e-2
        )
        with first.average.in_place():  # right after a step, when there is no second copy: one of the average appears
            found["average"] = weights(first)
        found[name] = weights(first)
        if name == "saved":
            save_state(first, Path(folder) / "state")
    with first.average.in_place():
        found["average again"] = weights(first)
    load_state(first, Path(folder) / "state")
    found["loaded"] = weights(first)
    del first
    gc.collect()
    found["another"] = weights(learner(seed=2))
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    folder = tmp_path_factory.mktemp("hierarchical")
    run_ranks(work, 2, folder, patience_s=150.0)
    seen: dict[str, Weights] = torch.load(folder / "found.pt")
    return seen


def equal(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_step_changes_the_weights(found: dict[str, Weights]) -> None:
    assert not equal(found["saved"], found["made"])
    assert not equal(found["learned"], found["saved"])


def test_a_loaded_state_is_what_is_gathered_and_what_a_pass_computes_with(found: dict[str, Weights]) -> None:
    assert equal(found["loaded"], found["saved"])


def test_the_average_in_place_is_what_is_gathered_and_is_gone_afterwards(found: dict[str, Weights]) -> None:
    for name in found["average"].keys() - {"answers"}:
        average = found["average"][name]
        made, saved, learned = (found[key][name] for key in ("made", "saved", "learned"))
        torch.testing.assert_close(average, made / 4 + saved / 4 + learned / 2, rtol=0, atol=1e-6)
    assert equal(found["average again"], found["average"])


def test_another_model_can_follow_in_the_same_process(found: dict[str, Weights]) -> None:
    assert found["another"].keys() == found["made"].keys()
    assert not equal(found["another"], found["made"])
