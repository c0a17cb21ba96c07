"""What a plan must not take: values that no run has, and placements that no cluster or engine can hold."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest

from rayrlhf.config import config_from
from rayrlhf.errors import ConfigError, ResourceError
from rayrlhf.planning.assumptions import assumptions_for
from rayrlhf.planning.catalogue import shape_named
from rayrlhf.planning.command import asked_of, plan_of
from rayrlhf.planning.form import lora_parameters, read_form
from rayrlhf.planning.hardware import hardware_named
from rayrlhf.planning.memory import kv_bytes_per_token
from rayrlhf.planning.plan import Plan, make_plan
from rayrlhf.planning.remedies import check_fits
from rayrlhf.planning.workload import Role, Workload

GIB = 2**30
H100, GPU = hardware_named("h100-80g"), assumptions_for("gpu")
Make = Callable[..., Workload]

SMALL = {
    "model": {"path": "facebook/opt-350m", "dtype": "bfloat16"},
    "data": {"prompts": ["p"], "demonstrations": ["d"], "max_prompt_tokens": 512},
    "run": {"stages": ["sft", "ppo"]},
    "cluster": {"device": "cuda"},
    "rollout": {"max_tokens": 512},
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mfu_train", 0.0),
        ("mfu_forward", 0.0),
        ("link_share", 0.0),
        ("decode_bandwidth", 0.0),
        ("host_adam_gb_s", 0.0),
        ("publish_gb_s", 0.0),
        ("mfu_train", float("inf")),
        ("call_ms", float("nan")),
        ("response_share", 3.0),
        ("fragmentation", 1.5),
    ],
)
def test_an_assumption_that_no_run_can_meet_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--assume: {name} is "):
        GPU.changed({name: value}, "--assume")


def test_the_supervised_workers_need_their_gpus_as_well() -> None:
    config = config_from(deepcopy(SMALL), ["cluster.train.ranks=64"], {})
    asked = asked_of(config)
    assert make_plan(asked.work, H100, GPU).nodes == 8
    plan = make_plan(asked.work, H100, GPU, nodes=1)
    assert [(s.roles, s.over) for s in plan.shortfalls] == [(("train",), 56)]
    assert plan.shortfalls[0].message == "train: 64 GPUs, 1 node of 8 have 8"


def test_what_the_supervised_workers_offload_must_fit_the_nodes_own_memory(workload: Make) -> None:
    large = shape_named("meta-llama/Llama-2-70b-hf", "m")
    train = Role("train", large, 8, learns=True, zero_stage=3)
    plan = make_plan(workload(train=train, train_micro_batch_tokens=4, offload_optimizer=True), H100, GPU)
    # 16 bytes a parameter, 69 billion of them on one node: over 1,000 GiB; twice that does not fit.
    assert plan.fits
    small = H100.model_copy(update={"device": H100.device.model_copy(update={"host_gib": 512})})
    plan = make_plan(workload(train=train, train_micro_batch_tokens=4, offload_optimizer=True), small, GPU)
    assert [s.roles for s in plan.shortfalls] == [("train",)]
    assert plan.shortfalls[0].message.startswith("train: 10")


def test_an_engines_shards_divide_its_heads(workload: Make) -> None:
    qwen = shape_named("Qwen/Qwen2.5-0.5B", "m")  # 14 heads
    for shards, fits in ((2, True), (4, False)):
        plan = make_plan(workload(roles={"rollout": Role("rollout", qwen, 1, float(shards))}), H100, GPU)
        assert plan.fits is fits
    assert plan.shortfalls[0].message == "rollout: 14 attention heads do not divide among 4 GPUs of an engine"


def test_shards_beyond_the_key_heads_hold_copies() -> None:
    shape = shape_named("Qwen/Qwen2.5-7B", "m")  # 4 heads of keys, 28 layers of 128
    assert kv_bytes_per_token(shape, 2) == kv_bytes_per_token(shape, 2, 4) == 2 * 28 * 4 * 128 * 2
    assert kv_bytes_per_token(shape, 2, 28) == 2 * 28 * 28 * 128 * 2


def test_every_expert_has_adapters_of_its_own() -> None:
    """Of Mixtral 8x7B: q and o are 4096 x 4096, k and v 4096 x 1024, each expert three matrices 4096 x 14336."""
    shape = shape_named("mistralai/Mixtral-8x7B-v0.1", "m")
    attention = 2 * (4096 + 4096) + 2 * (4096 + 1024)
    assert lora_parameters(shape, 16) == 16 * 32 * (attention + 8 * 3 * (4096 + 14336))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch_size: 64, minibatch_size: 512", "batch_size 64 is not a multiple of minibatch_size 512"),
        ("PLACE shared: [[polcy, value]]", "placement.shared"),
        ("PLACE shared: [[policy, value], [value, reward]]", "a role is in one set"),
        ("PLACE shared: [[policy, reward]]", "equally many ranks"),
    ],
)
def test_a_form_that_contradicts_itself_is_refused(change: str, message: str, tmp_path: Path) -> None:
    place = change.removeprefix("PLACE ") if change.startswith("PLACE") else "shared: []"
    work = "batch_size: 64, minibatch_size: 32" if change.startswith("PLACE") else change
    (tmp_path / "form.yaml").write_text(
        "workload: {models: {policy: facebook/opt-350m}, prompts: 100, prompt_tokens: {mean: 10, longest: 20}, "
        f"response_tokens: {{mean: 10, longest: 20}}, {work}}}\n"
        "placement: {policy: {ranks: 2}, value: {ranks: 2}, reference: {}, reward: {}, rollout: {}, " + place + "}\n"
    )
    with pytest.raises(ConfigError, match=message):
        read_form(tmp_path / "form.yaml")


def test_too_few_gpus_are_met_with_fewer_ranks_and_shared_devices() -> None:
    config = config_from(deepcopy(SMALL), ["cluster.policy.ranks=8", "plan.nodes=1", "plan.hardware=h100-80g"], {})

    def planned(other: object) -> Plan:
        asked = asked_of(other)  # type: ignore[arg-type]
        return plan_of(asked)

    with pytest.raises(ResourceError) as error:
        check_fits(config, planned(config), planned)
    assert "the roles take 12 GPUs, 1 node of 8 have 8" in error.value.message
    assert "cluster.policy.ranks=" in error.value.hint


def test_a_cache_too_small_for_one_sequence_is_made_larger() -> None:
    tree = {
        "model": {"path": "meta-llama/Llama-2-7b-hf"},  # 1 MiB a token in float32
        "data": {"prompts": ["p"], "max_prompt_tokens": 2048},
        "run": {"stages": ["ppo"]},
        "rollout": {"max_tokens": 2048, "kv_cache_gib": 1},
    }
    config = config_from(tree, [], {})
    large = hardware_named("cpu")
    roomy = large.model_copy(update={"device": large.device.model_copy(update={"host_gib": 1024})})

    def planned(other: object) -> Plan:
        asked = asked_of(other)  # type: ignore[arg-type]
        return make_plan(asked.work, roomy, asked.assume, asked.nodes)

    with pytest.raises(ResourceError, match="the key/value cache lacks") as error:
        check_fits(config, planned(config), planned)
    assert "rollout.kv_cache_gib=4" in error.value.hint


def test_an_engine_takes_its_share_of_a_whole_gpu_however_small_its_own_part(workload: Make) -> None:
    """vLLM knows nothing of Ray's fractions: 0.9 of a GPU of which it was promised a half."""
    shape = shape_named("meta-llama/Meta-Llama-3-8B", "m")
    half = {"rollout": Role("rollout", shape, 2, 0.5)}
    plan = make_plan(workload(half, gpu_memory_utilization=0.45), H100, GPU)
    assert plan.fits
    engine = plan.memory["rollout"]
    assert engine.resident + engine.working["prefill"] == pytest.approx(0.45 * 79.1 * GIB)
    (short,) = make_plan(workload(half, gpu_memory_utilization=0.9), H100, GPU).shortfalls
    more = sum(engine.publishing.values()) - engine.working["prefill"]
    assert short.over == pytest.approx(0.4 * 79.1 * GIB + more)


def test_sequences_longer_than_the_models_context_are_a_shortfall(workload: Make) -> None:
    llama = shape_named("meta-llama/Llama-2-7b-hf", "m")
    policy = {"policy": Role("policy", llama, 8, learns=True, zero_stage=3)}
    assert make_plan(workload(policy, longest_response=4092), H100, GPU).fits
    (short,) = make_plan(workload(policy, longest_response=4093), H100, GPU).shortfalls
    assert (
        short.message
        == "policy: 4097 tokens of prompt and response, one more than the 4096 of meta-llama/Llama-2-7b-hf"
    )
