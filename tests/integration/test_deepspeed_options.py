"""The `deepspeed` section under real DeepSpeed on a CPU: whatever is set, the weights learned are the same.

Offloading has nowhere to go from here, and yet runs its own code: accumulators, copies, norms. The optimizer is the
fused one where a GPU's would be; torch has it for CPUs too.
"""

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
from tests.ranks import run_ranks

pytestmark = pytest.mark.integration

PATIENCE_S = 150.0
STEPS, EXAMPLES = 3, 8
# The model's parameters are small enough that ZeRO-3 would leave them whole.
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ON_THE_HOST: dict[str, Any] = {"offload_optimizer": "cpu"}
# name: (ZeRO stage, keys of the section, tokens of a micro-batch)
CASES: dict[str, tuple[int, dict[str, Any], int]] = {
    "plain_0": (0, {}, 40),
    **{f"fused_{stage}": (stage, {}, 40) for stage in (0, 1, 2, 3)},
    **{f"checkpointed_{stage}": (stage, {"activation_checkpointing": True}, 40) for stage in (0, 1, 2)},
    "checkpointed_3": (3, {"activation_checkpointing": True, "extra": SHARD_ALL}, 40),
    **{f"optimizer_offloaded_{stage}": (stage, ON_THE_HOST, 40) for stage in (1, 2)},
    "optimizer_offloaded_3": (3, ON_THE_HOST | {"extra": SHARD_ALL}, 40),
    "lone_micro_batch_offloaded_1": (1, ON_THE_HOST, 4000),
    "lone_micro_batch_offloaded_2": (2, ON_THE_HOST, 4000),
    "weights_offloaded_3": (3, {"offload_param": "cpu", "extra": SHARD_ALL}, 40),
    "all_offloaded_3": (3, ON_THE_HOST | {"offload_param": "cpu", "extra": SHARD_ALL}, 40),
    "all_at_once_3": (
        3,
        ON_THE_HOST | {"offload_param": "cpu", "activation_checkpointing": True, "extra": SHARD_ALL},
        40,
    ),
    "hierarchical_3": (3, {"zero_hpz_partition_size": 2, "extra": SHARD_ALL}, 40),
    # Between steps the model leaves its device and comes back, as on one that roles share.
    **{f"shared_device_{stage}": (stage, {}, 40) for stage in (0, 1, 2)},
    "shared_device_3": (3, {"extra": SHARD_ALL}, 40),
    "shared_device_with_small_ones_whole_3": (3, {}, 40),
}


def examples() -> list[LMExample]:
    rng = np.random.default_rng(0)
    return [LMExample(rng.integers(2, 64, n).astype(np.int32), 0, "") for n in rng.integers(5, 20, STEPS * EXAMPLES)]


# ---- in the spawned processes ----------------------------------------------------------------------------------------


def train(name: str, measure: bool = False) -> dict[str, Any]:
    """Weights after three steps, the norms of each, and how often a layer's MLP ran in the first."""
    from rayrlhf.engines import deepspeed as engine
    from rayrlhf.engines.tasks import LanguageTask
    from rayrlhf.models.residence import weights_of

    gc.freeze()  # ZeRO-3 collects garbage when it starts: without this, two thirds of the time goes there
    stage, keys, budget = CASES[name]
    section = DeepSpeedConfig(**keys)
    spec = FromScratch(vocab_size=300, hidden_size=32, layers=2, heads=2, context=64)
    settings = engine.LearnerSettings(
        zero_stage=stage,
        dtype="float32",
        device="cpu",
        learning_rate=1e-3,
        betas=(0.9, 0.95),
        eps=1e-4,  # with a smaller one Adam would make a step of what rounding leaves of a zero gradient
        weight_decay=0.1,
        grad_clip=1.0,
        max_loss=1e4,
        failed_folder="failed",
        role="test",
        deepspeed=section.keys(),
        activation_checkpointing=section.activation_checkpointing,
    )
    learner = engine.Learner(from_scratch(spec, 64, 0, 1, seed=3), settings)
    task, calls, steps, here = LanguageTask(examples()), list[int](), list[dict[str, float]](), list[int]()
    learner.module.lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for step in range(STEPS):
        rows = list(range(step * EXAMPLES, (step + 1) * EXAMPLES))
        mine, total = rows[learner.rank :: learner.world_size], task.denominator(rows)
        batches = task.cut(mine, Cutting(budget), learner.device)
        steps.append(
            learner.train_step(
                lambda module, batch, total=total: task.loss(module, batch, total),
                batches,
                task.dummy(learner.device),
                1e-3,
                rest=task.cut(mine[:1], Cutting(budget), learner.device) if measure else (),
                measure=measure,
            )
        )
        if name.startswith("shared_device"):
            for part in ("none", "weights", "none", "all"):
                learner.occupy(part)
                here.append(sum(t.untyped_storage().nbytes() for t in weights_of(learner.module)))
    buckets = learner.named_buckets(learner.module.lm, 2**20)
    weights = {n: t.clone() for bucket in buckets for n, t in bucket}
    return {"weights": weights, "steps": steps, "passes": len(calls), "micro_batches": len(batches), "here": here}


def work(rank: int, world: int, port: int, folder: str) -> None:
    import deepspeed

    from rayrlhf.engines import deepspeed as engine
    from rayrlhf.engines.distributed import Rendezvous, join_process_group

    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cpu", 1, deterministic=True))
    plain_config = engine._learner_config

    def fused_config(settings: engine.LearnerSettings, zero_stage: int) -> dict[str, Any]:
        config = plain_config(settings, zero_stage)
        config["optimizer"]["params"]["fused"] = True
        return config

    found = {"plain_0": train("plain_0"), "measured_0": train("plain_0", measure=True)}
    engine._learner_config = fused_config
    names = [name for name in CASES if name != "plain_0" and (world == 2 or name != "hierarchical_3")]
    found |= {name: train(name) for name in names}
    found |= {f"measured_{name}": train(name, measure=True) for name in names if name.startswith("optimizer_off")}
    torch.save(found if rank == 0 else {}, Path(folder) / f"{rank}.pt")
    deepspeed.comm.barrier()
    gc.unfreeze()
    deepspeed.comm.destroy_process_group()  # else its threads may outlive the interpreter, which then aborts


# ---- the comparison --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder, world = tmp_path_factory.mktemp("options"), request.param
    run_ranks(work, world, folder, PATIENCE_S)
    return torch.load(folder / "0.pt", weights_only=True)


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, weights in expected["weights"].items():
        torch.testing.assert_close(got["weights"][name], weights, atol=5e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    for mine, other in zip(got["steps"], expected["steps"], strict=True):
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name != "plain_0"])
def test_the_weights_learned_are_those_of_one_plain_optimizer(name: str, found: dict[str, dict[str, Any]]) -> None:
    if name not in found:
        pytest.skip("needs two ranks")
    assert_same(found[name], found["plain_0"])


def test_the_gradients_of_the_comparison_are_clipped(found: dict[str, dict[str, Any]]) -> None:
    assert found["plain_0"]["steps"][0]["grad_norm"] > 1.0


@pytest.mark.parametrize("stage", range(4))
def test_a_model_whose_device_others_use_is_not_on_it_meanwhile(stage: int, found: dict[str, dict[str, Any]]) -> None:
    none, weights, again, everything = found[f"shared_device_{stage}"]["here"][:4]
    assert none == again == 0
    assert weights == everything > 0


@pytest.mark.parametrize("stage", range(4))
def test_checkpointed_activations_are_computed_again(stage: int, found: dict[str, dict[str, Any]]) -> None:
    once, twice = found[f"fused_{stage}"]["passes"], found[f"checkpointed_{stage}"]["passes"]
    assert twice == 2 * once > 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_to_be_measured_learns_the_same_with_the_optimizer_offloaded(
    stage: int, found: dict[str, dict[str, Any]]
) -> None:
    """Under ZeRO 1 and 2 DeepSpeed's sums on the host do not survive a boundary within a step: nothing is measured."""
    got = found[f"measured_optimizer_offloaded_{stage}"]
    assert_same(got, found["measured_0"])
    assert [("rest_norm" in step) for step in got["steps"]] == [stage == 3] * STEPS
    if stage == 3:
        for mine, other in zip(got["steps"], found["measured_0"]["steps"], strict=True):
            assert mine["rest_norm"] == pytest.approx(other["rest_norm"], rel=1e-4)
