"""Bytes by hand, and beside DeepSpeed's own estimators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from rayrlhf.config.model import FromScratch
from rayrlhf.models.build import from_scratch
from rayrlhf.planning.assumptions import assumptions_for
from rayrlhf.planning.catalogue import shape_named
from rayrlhf.planning.hardware import hardware_named
from rayrlhf.planning.memory import RankMemory, activation_bytes, logits_bytes, rank_memory, set_peak
from rayrlhf.planning.shapes import ModelShape, from_scratch_config, shape_of
from rayrlhf.planning.workload import Role, Workload

GIB = 2**30
Make = Callable[..., Workload]


def memory_of(work: Workload, role: str, hardware: str = "h100-80g") -> RankMemory:
    here = hardware_named(hardware)
    return rank_memory(work.roles[role], work, here, assumptions_for(here.device.kind))


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "master", "optimizer"),
    [
        (1, 18_000, 18_000, 12_000, 24_000),  # of 9,000 parameters on 3 ranks; whole weights and gradients
        (2, 18_000, 6_000, 12_000, 24_000),
        (3, 6_000, 6_000, 12_000, 24_000),
    ],
)
def test_a_zero_stage_shards_what_it_says(
    stage: int, weights: int, gradients: int, master: int, optimizer: int, shape: ModelShape, workload: Make
) -> None:
    work = workload({"policy": Role("policy", shape, 3, learns=True, zero_stage=stage)})
    memory = memory_of(work, "policy")
    assert memory.weights == {"weights": weights}
    assert memory.rest == {"gradients": gradients, "float32 weights": master, "optimizer": optimizer}


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_that_add_up_in_float32_take_twice_as_much(stage: int, shape: ModelShape, workload: Make) -> None:
    learner = {"policy": Role("policy", shape, 3, learns=True, zero_stage=stage)}
    assert memory_of(workload(learner, gradient_dtype="float32"), "policy").rest["gradients"] == 4 * 3_000


def test_without_zero_float32_needs_sixteen_bytes_a_parameter(shape: ModelShape, workload: Make) -> None:
    work = workload({"policy": Role("policy", shape, 1, learns=True, average=True)}, dtype="float32")
    memory = memory_of(work, "policy")
    assert sum(memory.weights.values()) + sum(memory.rest.values()) == 9_000 * (4 + 4 + 8 + 4), "4 are the average"


def test_offload_moves_the_optimizer_and_then_the_weights_to_the_host(shape: ModelShape, workload: Make) -> None:
    learner = {"policy": Role("policy", shape, 3, learns=True, zero_stage=3)}
    optimizer = memory_of(workload(learner, offload_optimizer=True), "policy")
    assert (sum(optimizer.weights.values()), sum(optimizer.rest.values())) == (6_000, 0)
    assert sum(optimizer.host.values()) == 3_000 * (4 + 8 + 4), "float32 weights, Adam, gradients"
    weights = memory_of(workload(learner, offload_optimizer=True, offload_param=True), "policy")
    assert (sum(weights.weights.values()), sum(weights.host.values())) == (0, 3_000 * (16 + 2))


def test_hpz_keeps_a_copy_for_each_node(shape: ModelShape, workload: Make) -> None:
    work = workload({"policy": Role("policy", shape, 6, learns=True, zero_stage=3)}, hpz=2)
    assert memory_of(work, "policy").weights == {"weights": 3_000, "hpZ copy": 9_000}


def test_a_frozen_model_is_whole_or_sharded(shape: ModelShape, workload: Make) -> None:
    assert memory_of(workload(), "reference").weights == {"weights": 18_000}
    sharded = memory_of(workload({"reference": Role("reference", shape, 3, zero_stage=3)}), "reference")
    assert (sharded.weights["weights"], sharded.working["gathered"]) == (6_000, 18_000)


def test_an_engine_gives_its_cache_what_weights_leave_of_its_share(workload: Make) -> None:
    shape = shape_named("meta-llama/Llama-2-7b-hf", "")
    memory = memory_of(workload({"rollout": Role("rollout", shape, 1, devices=2.0)}), "rollout")
    assert memory.weights["weights"] == 6_738_415_616, "two bytes each, on two GPUs"
    assert memory.resident + memory.working["prefill"] == pytest.approx(0.9 * 79.1 * GIB)


def test_lora_learns_few_weights(shape: ModelShape, workload: Make) -> None:
    work = workload({"policy": Role("policy", shape, 3, learns=True, zero_stage=2, trainable=300)})
    assert memory_of(work, "policy").rest == {"gradients": 200, "float32 weights": 400, "optimizer": 800}


def test_activations_of_a_layer_by_hand(shape: ModelShape) -> None:
    """Per token in float32: two norms of 3 x 10, q k v and the output 10 + 5 + 5 + 10 (k and v are half as wide), an
    MLP of 4 x 30: 60 + 30 + 120 = 210 entries; with a mask of 8 keys 10 + 10 + 10 + 10 + 8 in place of 30."""
    assert activation_bytes(shape, tokens=7, dtype_bytes=4, checkpointing=False) == 2 * 7 * 210 * 4
    assert activation_bytes(shape, tokens=7, dtype_bytes=4, checkpointing=True) == 2 * 7 * 10 * 4 + 7 * 210 * 4
    assert activation_bytes(shape, tokens=7, dtype_bytes=4, checkpointing=False, mask=8) == 2 * 7 * 228 * 4


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("architecture", "kv_heads", "dtype"),
    [("llama", None, "float32"), ("llama", 2, "float32"), ("llama", None, "bfloat16"), ("gpt2", None, "float32")],
)
def test_activations_are_what_autograd_keeps(architecture: str, kv_heads: int, dtype: str, packed: bool) -> None:
    """Storages that are saved for the backward pass, of a model of three layers less those of one of one layer."""
    kept = [saved_bytes(spec_of(architecture, kv_heads, layers), dtype, packed) for layers in (1, 3)]
    shape = shape_of(from_scratch_config(spec_of(architecture, kv_heads, 2)), architecture)
    size = 4 if dtype == "float32" else 2
    counted = activation_bytes(shape, 4 * 64, size, checkpointing=False, mask=64 if packed else 0)
    assert counted == pytest.approx(kept[1] - kept[0], rel=0.02)


def spec_of(architecture: str, kv_heads: int, layers: int) -> FromScratch:
    sizes = {"hidden_size": 128, "heads": 8, "kv_heads": kv_heads, "vocab_size": 400, "context": 64}
    return FromScratch(architecture=architecture, layers=layers, **sizes)


def saved_bytes(spec: FromScratch, dtype: str, packed: bool) -> int:
    """Of all storages but the weights, for 4 rows of 64 tokens."""
    model = from_scratch(spec, spec.vocab_size, 0, 1, seed=0).to(getattr(torch, dtype))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.arange(4 * 64).reshape(4, 64)
    positions = torch.cat([torch.arange(24), torch.arange(40)]).expand(4, -1) if packed else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, torch.tensor([5]), position_ids=positions)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)


def test_logits_are_held_in_one_chunk_or_in_several() -> None:
    assert logits_bytes(10, 100, 4, learns=True) == 12_000, "log-softmax, its gradient, that of the logits"
    assert logits_bytes(10, 100, 2, learns=False) == 2_000 + 8_000
    many = 2**26 / 100 * 4
    assert logits_bytes(many, 100, 2, learns=True) == pytest.approx(2 * 2 * 2**28 + 12 * 2**26)


def test_roles_that_take_turns_need_room_for_the_largest_moment() -> None:
    policy = RankMemory({"weights": 10.0}, {"optimizer": 40.0}, {"activations": 20.0}, framework=1.0)
    rollout = RankMemory({"weights": 10.0, "key/value cache": 45.0}, framework=1.0)
    assert set_peak({"policy": policy}) == 71
    assert set_peak({"policy": policy, "rollout": rollout}) == 72, "the update; both processes' own"
    small = replace(policy, rest={}, working={})
    assert set_peak({"policy": small, "rollout": rollout}) == 67, "the publish: weights beside a whole engine"


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("name", ["facebook/opt-1.3b", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf"])
def test_zero_2_needs_what_deepspeeds_own_estimator_says(name: str, ranks: int, workload: Make) -> None:
    shape = shape_named(name, "")
    work = workload({"policy": Role("policy", shape, ranks, learns=True, zero_stage=2)})
    for offload in (False, True):
        memory = memory_of(replace(work, offload_optimizer=offload), "policy")
        host, gpu = estimate_zero2_model_states_mem_needs(
            shape.parameters, ranks, 1, cpu_offload=offload, additional_buffer_factor=1.0
        )
        step = 0 if offload else 4 * shape.parameters / ranks  # the float32 copy of the gradient
        assert sum(memory.weights.values()) + sum(memory.rest.values()) + step == pytest.approx(gpu, rel=1e-6)
        if offload and ranks == 8:  # beyond 16 bytes a parameter the estimator counts weights while they are loaded
            held = sum(memory.host.values()) * ranks
            assert held == pytest.approx(16 * shape.parameters)
            assert host == pytest.approx(max(4 * ranks, 16) * shape.parameters)


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("name", ["facebook/opt-1.3b", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf"])
def test_zero_3_needs_what_deepspeeds_own_estimator_says_within_an_eighth(
    name: str, ranks: int, workload: Make
) -> None:
    """It counts 18 bytes a parameter and rank. There are 16, and at the step 4 of at most a sub-group of 10^9."""
    shape = shape_named(name, "")
    work = workload({"policy": Role("policy", shape, ranks, learns=True, zero_stage=3)})
    memory = memory_of(work, "policy")
    ours = sum(memory.weights.values()) + sum(memory.rest.values()) + 4 * min(1e9, shape.parameters / ranks)
    _, gpu, _ = estimate_zero3_model_states_mem_needs(shape.parameters, 0, ranks, 1, False, False)
    assert ours / gpu == pytest.approx(1, abs=0.125)


def test_zero_3_offloaded_leaves_on_the_host_what_deepspeeds_own_estimator_says(workload: Make) -> None:
    shape = shape_named("meta-llama/Llama-2-7b-hf", "")
    learner = {"policy": Role("policy", shape, 8, learns=True, zero_stage=3)}
    for param, nbytes in ((False, 16), (True, 18)):
        memory = memory_of(workload(learner, offload_optimizer=True, offload_param=param), "policy")
        host, gpu, _ = estimate_zero3_model_states_mem_needs(
            shape.parameters, 0, 8, 1, True, param, additional_buffer_factor=1.0
        )
        assert sum(memory.host.values()) * 8 == pytest.approx(nbytes * shape.parameters) == pytest.approx(host)
        assert sum(memory.weights.values()) + sum(memory.rest.values()) == pytest.approx(gpu)


def test_a_frozen_model_under_zero_3_on_a_cpu_holds_two_gathered_buckets_and_gloos_copies_of_one(
    shape: ModelShape, workload: Make
) -> None:
    """Of 500 million float32 parameters two buckets of 50 million, and twice one; of 9,000 all of them, and twice."""
    large = replace(shape, in_layers=500_000_000 - 1_010)
    for made, gathered, copies in ((large, 2 * 200_000_000, 2 * 200_000_000), (shape, 36_000, 72_000)):
        work = workload({"reward": Role("reward", made, 2, zero_stage=3)}, gpu=False, dtype="float32")
        working = memory_of(work, "reward", "cpu").working
        assert (working["gathered"], working["copies of gloo"]) == (gathered, copies)
    alone = workload({"reward": Role("reward", shape, 1, zero_stage=3)}, gpu=False, dtype="float32")
    assert memory_of(alone, "reward", "cpu").working.keys() == {"activations", "logits"}, "nobody to gather from"


def test_a_learner_under_zero_3_on_a_cpu_scatters_from_three_copies_of_the_gradient(
    shape: ModelShape, workload: Make
) -> None:
    """9,000 float32 parameters: the bucket, what it is flattened into, gloo's copy; a step takes 12 bytes each."""
    policy = Role("policy", shape, 3, learns=True, zero_stage=3)
    work = workload({"policy": policy}, gpu=False, dtype="float32")
    assert memory_of(work, "policy", "cpu").working["backward or step"] == 3 * 36_000


def test_a_scorer_on_a_cpu_holds_what_its_kernels_take(workload: Make) -> None:
    memory = memory_of(workload(gpu=False, dtype="float32"), "reference", "cpu")
    assert memory.framework == pytest.approx((0.5 + 0.015) * GIB)


@pytest.mark.parametrize(("tied", "weights"), [(True, 40_000), (False, 44_000)])
def test_an_engine_on_a_cpu_packs_its_head_and_keeps_what_it_freed(
    shape: ModelShape, workload: Make, tied: bool, weights: int
) -> None:
    """4 bytes of 8,000 parameters in layers, of a table and of a head's pack of 1,000 each, and of the head where it is
    not the table; what the layers came in is kept; the largest tensor waits."""
    roles = {"rollout": Role("rollout", replace(shape, tied=tied), 1)}
    memory = memory_of(workload(roles, gpu=False, dtype="float32", kv_cache_gib=2.0), "rollout", "cpu")
    assert memory.weights == {"weights": weights, "key/value cache": 2 * GIB}
    assert memory.publishing == {"waits for its layer": 4_000, "freed and kept": 32_000}
    assert memory.framework == pytest.approx((0.61 + 0.05) * GIB)
