"""What a publish holds of the weights that travel: buckets, on both sides, by transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rayrlhf.config import load_config
from rayrlhf.planning.assumptions import assumptions_for
from rayrlhf.planning.command import asked_of, plan_of
from rayrlhf.planning.hardware import GIB, hardware_named
from rayrlhf.planning.memory import RankMemory, rank_memory, set_peak
from rayrlhf.planning.plan import Plan, make_plan
from rayrlhf.planning.shapes import ModelShape
from rayrlhf.planning.workload import Role, Workload
from rayrlhf.weights.transports import TRANSPORTS

ROOT = Path(__file__).parents[3]
Make = Callable[..., Workload]
# Of the round shape in bfloat16: 18,000 bytes, 2,000 of them in its largest tensor.
WHOLE, LARGEST = 18_000, 2_000


def memory_of(work: Workload, role: str, hardware: str = "h100-80g") -> RankMemory:
    here = hardware_named(hardware)
    return rank_memory(work.roles[role], work, here, assumptions_for(here.device.kind))


def planned(*overrides: str, config: str = "configs/tiny.yaml") -> Plan:
    asked = asked_of(load_config(ROOT / config, overrides, {}))
    return plan_of(asked)


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_a_device_transport_holds_two_buckets_at_the_sender_and_one_at_the_engine(
    transport: str, workload: Make
) -> None:
    work = workload(transport=transport)
    policy, engine = memory_of(work, "policy"), memory_of(work, "rollout")
    assert (policy.buckets, policy.segments) == (2 * 4_000, 0)
    assert engine.publishing == {"bucket": 4_000, "waits for its layer": LARGEST}


def test_shared_memory_holds_two_buckets_on_the_host_of_the_policy_and_none_on_a_gpu(workload: Make) -> None:
    work = workload(transport="shared_memory")
    policy, engine = memory_of(work, "policy"), memory_of(work, "rollout")
    assert (policy.buckets, policy.segments) == (0, 2 * 4_000)
    assert engine.publishing == {"bucket": LARGEST, "waits for its layer": LARGEST}, "tensor by tensor"


def test_a_tensor_larger_than_a_bucket_has_one_of_its_own_and_a_small_model_none_larger_than_itself(
    workload: Make,
) -> None:
    assert memory_of(workload(bucket_bytes=500), "policy").buckets == 2 * LARGEST
    assert memory_of(workload(bucket_bytes=1e9), "policy").buckets == WHOLE


def test_under_zero_3_every_rank_gathers_the_bucket(shape: ModelShape, workload: Make) -> None:
    policy = {"policy": Role("policy", shape, 3, learns=True, zero_stage=3)}
    assert memory_of(workload(policy), "policy").publishing == {"gathered bucket": 4_000}
    assert memory_of(workload(), "policy").publishing == {}


def test_whoever_neither_sends_nor_receives_holds_no_bucket(workload: Make) -> None:
    for role in ("value", "reference", "reward"):
        memory = memory_of(workload(), role)
        assert (memory.buckets, memory.segments, memory.publishing) == (0, 0, {})


def test_the_senders_buckets_stay_on_a_device_that_others_use() -> None:
    policy = RankMemory({"weights": 10.0}, {"optimizer": 40.0}, {"activations": 20.0}, framework=1.0, buckets=5.0)
    rollout = RankMemory({"weights": 10.0, "key/value cache": 55.0}, framework=1.0)
    assert policy.peak == 76
    assert set_peak({"policy": policy, "rollout": rollout}) == 1 + 1 + 5 + 10 + 65


def test_a_publish_is_the_fullest_moment_where_it_holds_more_than_work_does() -> None:
    memory = RankMemory({"weights": 10.0}, {}, {"activations": 3.0}, {"gathered bucket": 4.0})
    assert memory.peak == 14
    assert memory.parts() == {"weights": 10.0, "gathered bucket": 4.0, "framework": 0.0, "sync buckets": 0.0}


@pytest.mark.parametrize("transport", [name for name in TRANSPORTS if name != "shared_memory"])
def test_larger_buckets_take_more_of_policy_and_engine(transport: str) -> None:
    shared = "[[policy, rollout]]" if transport == "ipc" else "[]"
    keys = (f"weights.transport={transport}", f"cluster.shared={shared}")
    small, large = (
        planned(*keys, f"weights.bucket_mib={mib}", config="configs/instructgpt/6b.yaml") for mib in (512, 4096)
    )
    assert large.memory["policy"].peak - small.memory["policy"].peak == pytest.approx(2 * 3.5 * GIB)
    assert large.memory["rollout"].peak > small.memory["rollout"].peak


def test_larger_buckets_take_more_of_a_machine_without_gpus() -> None:
    large = ("model.from_scratch.hidden_size=2048", "model.from_scratch.layers=24", "model.from_scratch.heads=16")
    held = [planned(*large, f"weights.bucket_mib={mib}").memory["policy"].segments for mib in (128, 1024)]
    assert held == [2 * 128 * 2**20, 2 * 2**30]


def test_an_engine_whose_buckets_do_not_fit_beside_it_is_named(workload: Make) -> None:
    h100, gpu = hardware_named("h100-80g"), assumptions_for("gpu")
    assert make_plan(workload(gpu_memory_utilization=0.9), h100, gpu).fits
    shape = replace(workload().roles["policy"].shape, embeddings=4 * GIB, in_layers=2 * GIB)
    roles = {"policy": Role("policy", shape, 8, learns=True, zero_stage=3), "rollout": Role("rollout", shape, 1)}
    work = workload(roles, gpu_memory_utilization=0.9, bucket_bytes=8 * GIB)
    (short,) = [short for short in make_plan(work, h100, gpu).shortfalls if short.roles == ("rollout",)]
    assert "in a publish" in short.message
