"""Seconds by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest

from rayrlhf.planning.assumptions import Assumptions, assumptions_for
from rayrlhf.planning.decoding import Decoder, Generation, forward_flops, generate_seconds
from rayrlhf.planning.hardware import Hardware, hardware_named
from rayrlhf.planning.lengths import response_lengths
from rayrlhf.planning.memory import RankMemory, rank_memory
from rayrlhf.planning.shapes import ModelShape
from rayrlhf.planning.time import RoleClock, StepTime, step_time
from rayrlhf.planning.workload import Role, Workload

Make = Callable[..., Workload]
# 1 TFLOPS at full use, 1 GB/s of memory and of links, nothing fixed.
ROUND = {
    "mfu_train": 1.0,
    "mfu_forward": 1.0,
    "micro_batch_ms": 0.0,
    "decode_bandwidth": 1.0,
    "decode_flops": 1.0,
    "decode_step_ms": 0.0,
    "decode_sequence_us": 0.0,
    "tensor_parallel_ms": 0.0,
    "link_share": 1.0,
    "overlap": 0.0,
    "optimizer_bandwidth": 1.0,
    "host_adam_gb_s": 1.0,
    "publish_gb_s": 1.0,
    "publish_fixed_s": 0.0,
    "call_ms": 0.0,
    "estimate_us": 0.0,
}


@pytest.fixture
def hardware() -> Hardware:
    known = hardware_named("h100-80g")
    flops = known.device.tflops.model_copy(update={"bfloat16": 1.0, "float32": 1.0})
    device = known.device.model_copy(update={"tflops": flops, "memory_gb_s": 1.0, "memory_gib": 1.0})
    link = known.within.model_copy(update={"gb_s": 1.0, "latency_us": 0.0})
    return known.model_copy(update={"device": device, "within": link, "between": link, "host": link})


@pytest.fixture
def assume() -> Assumptions:
    return assumptions_for("gpu").changed(ROUND, "the test")


def timed(work: Workload, hardware: Hardware, assume: Assumptions) -> StepTime:
    memory = {name: rank_memory(role, work, hardware, assume) for name, role in work.roles.items()}
    memory["rollout"] = RankMemory({"weights": 18_000.0, "key/value cache": 1e6})
    return step_time(work, hardware, assume, memory)


def test_a_forward_pass_is_two_flops_a_parameter_and_four_a_key(shape: ModelShape) -> None:
    """100 tokens x (2 x 7,000 + 4 x 5 keys x 10 wide x 2 layers) + 60 asked x 2 x 1,000."""
    assert forward_flops(shape, 100, 60, attended=5) == 100 * 14_400 + 120_000


def test_scoring_and_learning_take_their_flops(
    workload: Make, hardware: Hardware, assume: Assumptions, shape: ModelShape
) -> None:
    """80 tokens, 48 asked of a head of 1,000; 5 keys attended in the mean: 1.152 and 0.096 MFLOPs at 1 TFLOPS."""
    time = timed(workload(), hardware, assume)
    assert time.by_role["score"]["reference"] == pytest.approx(1.248e-6)
    assert time.by_role["score"]["reward"] == pytest.approx((1.152e6 + 48 * 2 * 10) * 1e-12)
    # Forward and backward are three times that, and twice the optimizer goes over 30 bytes of 9,000 parameters.
    assert time.by_role["update"]["policy"] == pytest.approx(3 * 1.248e-6 + 2 * 30 * 9_000 / 1e9)
    again = timed(workload(checkpointing=True), hardware, assume)
    assert again.by_role["update"]["policy"] - time.by_role["update"]["policy"] == pytest.approx(1.152e-6)


def test_text_of_ptx_is_learned_by_the_policy_alone(workload: Make, hardware: Hardware, assume: Assumptions) -> None:
    """2 blocks of 10 tokens a response: 160 tokens more, all of them asked about."""
    plain = timed(workload(), hardware, assume).by_role["update"]
    ptx = timed(workload(text_blocks=2.0, text_tokens=10), hardware, assume).by_role["update"]
    assert ptx["policy"] - plain["policy"] == pytest.approx(3 * (160 * 14_400 + 160 * 2_000) * 1e-12)
    assert ptx["value"] == plain["value"]


@pytest.mark.parametrize(
    ("stage", "sent"),
    [
        (1, 2 * 9_000 + 2 * 9_000),  # gradients and weights, two bytes each, once a minibatch
        (2, 2 * 2 * 9_000 + 2 * 9_000),  # gradients of both micro-batches
        (3, 2 * 3 * 2 * 9_000),  # weights twice and gradients, of both
    ],
)
def test_zero_sends_its_share_between_ranks(
    stage: int, sent: int, workload: Make, hardware: Hardware, assume: Assumptions, shape: ModelShape
) -> None:
    """Two minibatches of 40 tokens, 20 a rank in micro-batches of 10; half of what is sent crosses."""
    work = workload({"policy": Role("policy", shape, 2, learns=True, zero_stage=stage)}, micro_batch_tokens=10)
    seconds = timed(work, hardware, assume).by_role["update"]["policy"]
    arithmetic = 3 * 1.248e-6 / 2 + 2 * 30 * 4_500 / 1e9
    assert seconds - arithmetic == pytest.approx(2 * sent / 2 / 1e9)


def boundless(assume: Assumptions) -> Assumptions:
    """The same numbers, and nothing is held to what a GPU is rated at."""
    return Assumptions(assume.known, "cpu")


def test_ranks_wait_for_the_one_with_the_longest_sequence(
    workload: Make, hardware: Hardware, assume: Assumptions, shape: ModelShape
) -> None:
    """On four ranks each has one sequence of ten tokens; on eight some have none, and nothing is gained."""
    at = {n: Role("value", shape.as_scalar(), n, learns=True, zero_stage=0) for n in (4, 8)}
    quick = boundless(assume).changed({"link_share": 1e9}, "the test")
    times = {n: timed(workload({"value": role}), hardware, quick).by_role["update"]["value"] for n, role in at.items()}
    assert times[4] == pytest.approx(times[8])


def test_roles_on_shared_gpus_work_one_after_the_other_and_move(
    workload: Make, hardware: Hardware, assume: Assumptions
) -> None:
    apart = timed(workload(), hardware, assume)
    shared = timed(workload(shared=(("policy", "value"), ("reference", "reward"))), hardware, assume)
    assert apart.phases["update"] == max(apart.by_role["update"].values())
    assert shared.phases["update"] == pytest.approx(sum(shared.by_role["update"].values()))
    assert apart.phases["move"] == 0
    # Weights, gradients, float32 weights, Adam: 16 bytes of 9,000 and of 9,010 parameters, there and back.
    assert shared.phases["move"] == pytest.approx(2 * 16 * (9_000 + 9_010) / 1e9)


def test_finished_responses_are_scored_while_others_are_sampled(
    workload: Make, hardware: Hardware, assume: Assumptions
) -> None:
    """Nine tenths at most, half of generation at most; on shared GPUs nothing."""
    late, early = (timed(workload(), hardware, assume.changed({"scored_early": s}, "the test")) for s in (0.0, 0.5))
    assert late.phases["score"] == max(late.by_role["score"].values())
    assert early.phases["score"] == pytest.approx(0.1 * late.phases["score"])
    assert early.phases["generate"] == late.phases["generate"]
    little = timed(workload(), hardware, assume.changed({"scored_early": 1e-4}, "the test"))
    gone = late.phases["score"] - little.phases["score"]
    assert gone == pytest.approx(1e-4 * late.phases["generate"])
    shared = timed(workload(shared=(("policy", "rollout"),)), hardware, assume)
    assert shared.phases["score"] == late.phases["score"]


def test_scoring_beside_sampling_shares_the_cores_of_a_cpu_and_the_longest_responses_come_last(
    workload: Make, hardware: Hardware, assume: Assumptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine's thread and one scorer's on one core: each goes half as fast while both are there.

    Eight responses, to prompts of 4 tokens, are done after 1, 2, ... 8 s. With 6 tokens each the scoring of every one
    takes 1 s, and is over in the 2 s that the next one then takes: seven are scored early, one is left. With 76 tokens
    the last one and its prompt are 80 of 150, and so is what is left of 8 s. A pass that takes 0.25 s, however little
    there is in it, is one for each of them.
    """
    one_core = hardware.model_copy(update={"device": hardware.device.model_copy(update={"per_node": 1})})
    clock = RoleClock(workload(gpu=False), one_core, assume)
    monkeypatch.setattr(clock, "together", lambda seconds: sum(seconds.values()))
    monkeypatch.setattr(clock, "score", lambda role, part: 8.0 * part)
    reward = [clock.work.roles["reward"]]
    alike = Generation(8.0, 0.0, 0.0, 8, tuple((float(i), 6.0) for i in range(1, 9)))
    assert clock.scored_beside(reward, alike, generate=8.0) == pytest.approx((7.0, 1.0))
    tail = replace(alike, finished=(*alike.finished[:7], (8.0, 80.0 - 4.0)))
    early, late = clock.scored_beside(reward, tail, generate=8.0)
    assert late == pytest.approx(8.0 * 80 / 150)
    assert early + late == pytest.approx(8.0)
    monkeypatch.setattr(clock, "score", lambda role, part: 8.0 * part + 0.25)
    assert clock.scored_beside(reward, tail, generate=8.0)[1] == pytest.approx(8.0 * 80 / 150 + 0.25)


def test_a_part_of_a_batch_takes_a_pass_at_the_least(workload: Make, hardware: Hardware, assume: Assumptions) -> None:
    slow = assume.changed({"micro_batch_ms": 1000.0}, "the test")
    clock, free = (
        RoleClock(workload(), hardware, a) for a in (slow, slow.changed({"micro_batch_ms": 0.0}, "the test"))
    )
    role = clock.work.roles["reward"]
    assert clock.score(role, 1 / 8) - free.score(role, 1 / 8) == pytest.approx(1.0)


def test_overlap_takes_the_longer_side(workload: Make, hardware: Hardware, assume: Assumptions) -> None:
    sync, overlap = (timed(workload(overlap=on), hardware, assume) for on in (False, True))
    assert sync.seconds == pytest.approx(sum(sync.phases.values()))
    assert max(sync.phases.values()) <= overlap.seconds < sync.seconds


def test_a_decoding_step_reads_weights_and_cache(shape: ModelShape, hardware: Hardware, assume: Assumptions) -> None:
    """8,990 parameters in layers and head, 2 bytes each, and 20 entries x 2 bytes of 100 cached tokens, at 1 GB/s."""
    decoder = Decoder(shape, "bfloat16", 2, 1.0, hardware, assume)
    assert decoder.step(sequences=4, cached=100) == pytest.approx((17_980 + 4_000) / 1e9)
    bound = Decoder(shape, "bfloat16", 2, 1.0, hardware, assume.changed({"decode_flops": 1e-6}, "the test"))
    assert bound.step(4, 100) == pytest.approx((4 * (14_000 + 2_000) + 4 * 100 * 10 * 2) / 1e6)


def test_a_mixture_reads_the_experts_that_someone_chose(
    shape: ModelShape, hardware: Hardware, assume: Assumptions
) -> None:
    """4 experts of 1,000 a layer in 2 layers, one a token: of one sequence a quarter, of two 1 - (3/4)^2."""
    mixture = replace(shape, experts=4, experts_per_token=1, in_experts=8_000, in_layers=9_000)
    decoder = Decoder(mixture, "bfloat16", 2, 1.0, hardware, assume)
    assert decoder.step(1, 0) == pytest.approx(2 * (1_000 + 1_000 + 2_000) / 1e9)
    assert decoder.step(2, 0) == pytest.approx(2 * (1_000 + 1_000 + 3_500) / 1e9)


def test_responses_come_in_waves_where_the_cache_holds_few(
    workload: Make, hardware: Hardware, assume: Assumptions
) -> None:
    """8 responses of 6 tokens; a sequence holds 10 tokens of 40 bytes. Weights alone count: 18 us a step."""
    work = workload()
    light = boundless(assume).changed({"mfu_forward": 1e9}, "the test")
    step = 17_980 / 1e9
    for places, steps in ((8, 6), (4, 12), (3, 18), (1, 48)):
        made = generate_seconds(work.roles["rollout"], work, hardware, light, cache=places * 400 + 1)
        reading = sum(8 * (4 + age + 0.5) * 40 for age in range(6)) / 1e9  # the cached keys and values, however dealt
        assert made.places == places
        assert made.seconds == pytest.approx(steps * step + reading, rel=0.01)


def test_one_long_response_makes_a_tail(workload: Make, hardware: Hardware, assume: Assumptions) -> None:
    even = workload(longest_response=600, response_tokens=60.0)
    spread = workload(longest_response=600, response_tokens=60.0, response_spread=1.0)
    times = [generate_seconds(w.roles["rollout"], w, hardware, assume, 1e9) for w in (even, spread)]
    assert times[0].tail == 0
    assert times[1].seconds > 2 * times[0].seconds
    assert times[1].tail > 0.5 * times[1].seconds


@pytest.mark.parametrize("spread", [0.3, 0.6, 1.2])
def test_lengths_have_the_mean_and_spread_asked_for(spread: float) -> None:
    lengths = response_lengths(1000, mean=100, longest=10_000, spread=spread)
    assert statistics.mean(lengths) == pytest.approx(100, rel=1e-3)
    assert statistics.stdev(map(math.log, lengths)) == pytest.approx(spread, rel=0.03)
    assert statistics.mean(lengths[:100]) == pytest.approx(100, rel=0.15), "in no order"


def test_lengths_are_cut_at_the_longest_and_keep_their_mean() -> None:
    lengths = response_lengths(1000, mean=100, longest=150, spread=1.0)
    assert max(lengths) == 150
    assert statistics.mean(lengths) == pytest.approx(100, rel=1e-3)
    assert set(response_lengths(5, 7, 7, 1.0)) == {7}


def test_what_is_drawn_beside_learning_is_scored_as_it_is_finished_too(
    workload: Make, shape: ModelShape, hardware: Hardware, assume: Assumptions
) -> None:
    """Frozen models alone: the learners score when the batch comes to them (driver/pacing.py)."""
    slow = {"reference": Role("reference", shape, 1, copies=1000)}
    made = timed(workload(slow, overlap=True), hardware, assume)
    drawn = made.phases["generate"] + made.by_role["score"]["reference"] - 0.5 * made.phases["generate"]
    assert made.seconds == pytest.approx(drawn + made.phases["publish"])


def test_overlap_waits_for_devices_that_both_sides_share(
    workload: Make, shape: ModelShape, hardware: Hardware, assume: Assumptions
) -> None:
    """A reference that takes turns with the policy scores the next batch before or after this one is learned from."""
    slow = {"reference": Role("reference", shape, 1, copies=1000)}
    made = timed(workload(slow, overlap=True, shared=(("policy", "reference"),)), hardware, assume)
    score, update = made.by_role["score"], made.by_role["update"]
    turns = score["policy"] + score["reference"] + update["policy"]
    drawn = made.phases["generate"] + score["reference"] - 0.5 * made.phases["generate"]
    assert made.seconds == pytest.approx(max(turns, drawn) + made.phases["publish"] + made.phases["move"])
    assert turns > drawn
