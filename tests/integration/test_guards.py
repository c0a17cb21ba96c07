"""What the guard says when a step breaks: real DeepSpeed learners, one process and a pair, no Ray.

Each case plants one fault, takes one step and keeps what each rank raised; the files are read back afterwards.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rayrlhf.config.model import FromScratch
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample
from rayrlhf.models.build import PolicyModel, from_scratch
from rayrlhf.types import Experience, Rollout, RolloutInfo
from tests.learners import learner_settings
from tests.ranks import run_ranks

pytestmark = pytest.mark.integration

VOCAB, STAGES = 64, [0, 1, 2, 3]
MLP = "lm.model.layers.1.mlp"
# More than the whole file takes; a rank that waits for another would wait for half an hour.
PATIENCE_S = 120.0


def policy() -> PolicyModel:
    spec = FromScratch(vocab_size=300, hidden_size=32, layers=2, heads=2, context=64, tie_embeddings=False)
    return from_scratch(spec, VOCAB, 0, 1, seed=3)


def experiences() -> list[Experience]:
    """One for rank 0; three of different lengths, so more micro-batches, for the last rank."""
    rng = np.random.default_rng(7)
    made = []
    for i, response in enumerate([3, 4, 6, 9]):
        row = rng.integers(2, VOCAB, 2 + response).astype(np.int32)
        rollout = Rollout(
            RolloutInfo(10 + i, i, 2 + response, response, truncated=False),
            row,
            np.zeros(response, np.float32),
            np.zeros(response, np.int32),
        )
        old = np.full(response, -4.0, np.float32)
        made.append(Experience(rollout, old, np.ones(response, np.float32), np.zeros(response, np.float32), old))
    return made


# ---- in the spawned processes ----------------------------------------------------------------------------------------


def new_learner(module: nn.Module, stage: int, folder: str, case: str, max_loss: float = 1e4) -> Any:
    from rayrlhf.engines.deepspeed import Learner

    gc.freeze()  # ZeRO-3 collects garbage when it starts: without this, two thirds of the time goes there
    settings = learner_settings(
        stage,
        eps=1e-5,
        max_loss=max_loss,
        failed_folder=folder,
        role=f"{case}-{stage}",
        # A key of ZeRO's own: else one rank, which has nothing to shard, would go back to stage 0.
        deepspeed={"zero_optimization": {"allgather_partitions": True}},
    )
    return Learner(module, settings)


def ppo_step(learner: Any, data: list[Experience]) -> None:
    from rayrlhf.engines.learning import UpdateSettings, update_policy

    mine = [[0], [1, 2, 3]][learner.rank] if learner.world_size == 2 else [0, 1, 2, 3]
    # 11 tokens a micro-batch: one row each, the longest first.
    update_policy(learner, data, [mine], data[0], UpdateSettings(clip=0.2, cutting=Cutting(11, packed=False)), 1e-3)


def with_advantage(value: float) -> list[Experience]:
    """`value` as the last advantage of sample 12: the second longest, so the last rank's micro-batch 1."""
    data = experiences()
    advantages = data[2].advantages.copy()
    advantages[-1] = value
    data[2] = replace(data[2], advantages=advantages)
    return data


def nan_advantage(stage: int, folder: str) -> None:
    ppo_step(new_learner(policy(), stage, folder, "nan_advantage"), with_advantage(math.nan))


def exploding_advantage(stage: int, folder: str) -> None:
    ppo_step(new_learner(policy(), stage, folder, "exploding_advantage"), with_advantage(-1e9))


def nan_parameter(stage: int, folder: str) -> None:
    module = policy()
    with torch.no_grad():  # at its end, which under ZeRO-3 is the last rank's
        module.get_parameter(f"{MLP}.up_proj.weight")[-1, -1] = math.nan
    ppo_step(new_learner(module, stage, folder, "nan_parameter"), experiences())


def overflowing_layer(stage: int, folder: str) -> None:
    module = policy()
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            module.get_parameter(f"{MLP}.{name}.weight").mul_(1e30)
    ppo_step(new_learner(module, stage, folder, "overflowing_layer"), experiences())


def nan_gradient(stage: int, folder: str) -> None:
    """A finite loss, 0, whose derivative is not: the root of 0. The step must not be taken."""
    learner = new_learner(policy(), stage, folder, "nan_gradient")

    def weights() -> dict[str, Tensor]:
        return {n: t.clone() for bucket in learner.named_buckets(learner.module, 4096) for n, t in bucket}

    def loss(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module(tokens=batch[0], positions=batch[1]) * 0).sum().abs().sqrt()

    before, batch = weights(), (torch.arange(2, 8)[None], torch.arange(1, 6))
    try:
        learner.train_step(loss, [batch], batch, 1e-3)
    finally:
        assert all(torch.equal(before[name], tensor) for name, tensor in weights().items())


def strict_limit(stage: int, folder: str) -> None:
    """A supervised stage, whose loss starts near log(64) = 4.2."""
    from rayrlhf.engines.tasks import LanguageTask
    from rayrlhf.supervised.loop import TrainSettings, train

    learner = new_learner(policy(), stage, folder, "strict_limit", max_loss=2.0)
    examples = [LMExample(e.rollout.tokens, 0, "") for e in experiences()]
    settings = TrainSettings(1e-3, len(examples), 1, 0.0, 0.1, Cutting(16, packed=False), 1, 0)
    train(learner, LanguageTask(examples), settings, lambda record: None)


def no_folder(stage: int, folder: str) -> None:
    ppo_step(new_learner(policy(), stage, "/dev/null/failed", "no_folder"), with_advantage(math.nan))


def healthy(stage: int, folder: str) -> None:
    ppo_step(new_learner(policy(), stage, folder, "healthy"), experiences())


CASES: dict[str, Callable[[int, str], None]] = {
    case.__name__: case
    for case in (
        nan_advantage,
        exploding_advantage,
        nan_parameter,
        overflowing_layer,
        nan_gradient,
        strict_limit,
        no_folder,
        healthy,
    )
}


def work(rank: int, world: int, port: int, folder: str) -> None:
    import deepspeed

    from rayrlhf.engines.distributed import Rendezvous, join_process_group
    from rayrlhf.errors import TrainingError

    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cpu", 1, deterministic=True))
    raised: dict[str, list[str] | None] = {}
    for name, case in CASES.items():
        for stage in STAGES:
            raised[f"{name}-{stage}"] = None
            try:
                case(stage, f"{folder}/failed")
            except TrainingError as error:
                raised[f"{name}-{stage}"] = [error.message, error.hint]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(raised))
    deepspeed.comm.barrier()
    gc.unfreeze()
    deepspeed.comm.destroy_process_group()  # else its threads may outlive the interpreter, which then aborts


# ---- what they raised and wrote --------------------------------------------------------------------------------------


class Outcome:
    def __init__(self, folder: Path, world: int) -> None:
        self.failed, self.world = folder / "failed", world
        self.raised = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]

    def message(self, case: str, stage: int) -> str:
        """The same on every rank."""
        messages = [r[f"{case}-{stage}"] for r in self.raised]
        assert messages[0], f"{case} was not noticed at stage {stage}"
        assert all(m == messages[0] for m in messages), messages
        return messages[0][0]

    def on(self, rank: int) -> str:
        return f" on rank {rank}" if self.world > 1 else ""

    def tensors(self, case: str, stage: int, rank: int) -> dict[str, Tensor]:
        return load_file(self.failed / f"{case}-{stage}-{rank}.safetensors")

    def description(self, case: str, stage: int, rank: int) -> dict[str, Any]:
        return json.loads((self.failed / f"{case}-{stage}-{rank}.json").read_text())


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder, world = tmp_path_factory.mktemp("guards"), request.param
    run_ranks(work, world, folder, PATIENCE_S)
    return Outcome(folder, world)


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_advantage_is_named_and_is_in_the_file(stage: int, outcome: Outcome) -> None:
    rank = outcome.world - 1
    message = outcome.message("nan_advantage", stage)
    assert message.startswith("the loss is not finite (nan); the first bad tensor: ")
    assert f": advantages of micro-batch 1{outcome.on(rank)} (1 of 6 numbers); " in message
    assert f"its batch is in {outcome.failed}/nan_advantage-{stage}-{rank}.safetensors" in message
    written = outcome.tensors("nan_advantage", stage, rank)
    assert written["1.advantages"].isnan().tolist() == [False] * 5 + [True]
    assert written["1.batch.layout.tokens"].shape == (1, 8)


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_leaves_its_batch_and_what_it_found(stage: int, outcome: Outcome) -> None:
    for rank in range(outcome.world):
        rows = 4 if outcome.world == 1 else (1, 3)[rank]
        tokens = [k for k in outcome.tensors("nan_advantage", stage, rank) if k.endswith(".layout.tokens")]
        description = outcome.description("nan_advantage", stage, rank)
        assert len(tokens) == len(description["loss_share_per_micro_batch"]) == rows
        assert description["settings"]["zero_stage"] == stage
        assert description["zero_stage_in_use"] == stage
        found = description["first_bad_tensor_of_this_rank"]
        if rank == outcome.world - 1:
            assert description["loss_share_per_micro_batch"][1] == "nan"
            assert found["name"].startswith("advantages of micro-batch")
        else:
            assert found["name"].startswith("the gradient of")  # reduced, so the other rank's NaN is in it


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_weight_is_named_before_all_that_it_breaks(stage: int, outcome: Outcome) -> None:
    holder = outcome.world - 1 if stage == 3 else 0
    name = f"the parameter {MLP}.up_proj.weight{outcome.on(holder)} (1 of "
    assert f"; the first bad tensor: {name}" in outcome.message("nan_parameter", stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_layer_that_overflows_is_named_by_its_innermost_module(stage: int, outcome: Outcome) -> None:
    where = f"the output of {MLP}.down_proj in micro-batch 0{outcome.on(0)} ("
    assert f"; the first bad tensor: {where}" in outcome.message("overflowing_layer", stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_finite_loss_over_the_limit_names_the_largest_tensor(stage: int, outcome: Outcome) -> None:
    """One token of 22 has advantage -1e9, so the loss is about 1e9 / 22 times its ratio, which is near 1."""
    rank = outcome.world - 1
    message = outcome.message("exploding_advantage", stage)
    assert message.startswith("the loss ")
    assert 2e7 < float(message.split()[2]) < 1e8
    assert " is over run.max_loss 10000; " in message
    assert f"the largest: advantages of micro-batch 1{outcome.on(rank)} (up to 1e+09); " in message
    assert outcome.tensors("exploding_advantage", stage, rank)["1.advantages"].min() == -1e9


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_gradient_of_a_finite_loss_is_named_and_the_weights_stay(stage: int, outcome: Outcome) -> None:
    message = outcome.message("nan_gradient", stage)
    assert message.startswith("the gradient is not finite; the first bad tensor: the gradient of lm.lm_head.weight")
    assert message.endswith("; the weights are those before the step")


@pytest.mark.parametrize("stage", STAGES)
def test_a_supervised_stage_is_guarded_by_the_global_loss(stage: int, outcome: Outcome) -> None:
    message = outcome.message("strict_limit", stage)
    assert 4.0 < float(message.split()[2]) < 4.4
    assert " is over run.max_loss 2; the largest: " in message
    assert outcome.tensors("strict_limit", stage, 0)["0.batch.layout.tokens"].dtype == torch.int64


@pytest.mark.parametrize("stage", STAGES)
def test_where_nothing_can_be_written_the_error_still_names_the_tensor(stage: int, outcome: Outcome) -> None:
    message = outcome.message("no_folder", stage)
    assert "the first bad tensor: advantages of micro-batch " in message
    assert "its batch could not be written to /dev/null/failed/no_folder-" in message


def test_a_sound_step_raises_nothing_and_writes_nothing(outcome: Outcome) -> None:
    assert [r[f"healthy-{stage}"] for r in outcome.raised for stage in STAGES] == [None] * 4 * outcome.world
    assert not list(outcome.failed.glob("healthy*"))
