"""The loop, run with fakes: who is called when, with what, and what is written."""

import asyncio
import gc
import tracemalloc
from dataclasses import replace

import pytest
from driver_fakes import KL, World

from rayrlhf.algorithms.kl import AdaptiveKL
from rayrlhf.checkpoint.ledger import Accounted
from rayrlhf.driver.loop import run_ppo
from rayrlhf.driver.pacing import PromptStream, SyncPacing
from rayrlhf.errors import ActorError, ActorLost, CheckpointError, DataLost, Stopped, TrainingError, WeightSyncError

BATCH = 3
# Of one step, in order.
CALLS = [
    *("generate", "frozen", "learning", "estimate", "update"),
    *("publish", "ledger step", "write_samples", "gauges", "write", "save", "ledger checkpoint"),
]


def drive(world: World, steps: int = 3, kl=None) -> int:
    pacing = SyncPacing(PromptStream([10, 11, 12, 13, 14], seed=0), BATCH, steps, world.clock)
    return asyncio.run(run_ppo(world.parts(), pacing, kl or KL()))


def named(world: World, name: str) -> list[tuple]:
    return [event[1:] for event in world.log if event[0] == name]


def test_each_step_calls_every_part_in_order():
    world = World()
    assert drive(world, steps=2) == 2
    assert [event[0] for event in world.log] == ["publish", *CALLS, *CALLS]
    assert world.phases == ["generate", "score", "estimate", "update", "publish", "save"] * 2


def test_version_0_is_published_before_the_first_sample_and_versions_rise_by_one():
    world = World()
    drive(world, steps=4)
    assert world.log[0] == ("publish", 0)
    assert named(world, "publish") == [(0,), (1,), (2,), (3,), (4,)]
    assert [r["weights/version"] for r in world.records] == [1, 2, 3, 4]


def test_handles_travel_from_part_to_part_unopened():
    world = World()
    drive(world, steps=2)
    assert named(world, "frozen") == named(world, "learning") == [("rollouts 0",), ("rollouts 1",)]
    assert [call[:3] for call in named(world, "estimate")] == [
        ("rollouts 0", "frozen 0", "learning 0"),
        ("rollouts 1", "frozen 1", "learning 1"),
    ]
    assert named(world, "update") == [("experience 0", 0), ("experience 1", 1)]


def test_steps_are_counted_from_one_in_everything_written():
    world = World()
    drive(world)
    assert named(world, "write") == named(world, "write_samples") == [(1,), (2,), (3,)]
    assert [step for step, *_ in named(world, "save")] == [1, 2, 3]
    assert world.samples == [(step, [{"response": "yes"}]) for step in (1, 2, 3)]


def test_the_kl_controller_hears_the_kl_and_the_samples_of_each_step():
    kl = KL()
    drive(World(), kl=kl)
    assert kl.updates == [(2.0, BATCH), (3.0, BATCH), (4.0, BATCH)]


def test_a_step_uses_and_reports_the_coefficient_from_before_its_own_update():
    world, kl = World(), KL(0.1)
    drive(world, kl=kl)
    assert [call[-1] for call in named(world, "estimate")] == [0.1, 0.2, 0.4]
    assert [record["kl/coef"] for record in world.records] == [0.1, 0.2, 0.4]
    assert kl.coef == 0.8


def test_a_checkpoint_holds_the_coefficient_of_the_step_that_follows():
    world = World()
    drive(world, kl=KL(0.1))
    assert named(world, "save") == [(1, 0.2, 0.5, False), (2, 0.4, 0.5, False), (3, 0.8, 0.5, False)]


@pytest.mark.parametrize("phase", ["generate", "frozen", "learning", "estimate", "update", "publish", "write"])
def test_a_run_that_is_asked_to_end_drops_responses_or_ends_the_step_and_saves(phase):
    """Asked for in a phase of the second step."""
    world, whole = World(), phase not in ("generate", "frozen", "learning")
    called = world._called

    def asked(name, *details):
        if name == phase and [event[0] for event in world.log].count(phase) == 1 + (phase == "publish"):
            world.stop.set()
        return called(name, *details)

    world._called = asked
    with pytest.raises(Stopped, match=f"stopped after step {1 + whole}, which is saved"):
        drive(world, steps=9)
    assert world.log[-2][:2] == ("save", 1 + whole)
    assert world.log[-2][-1] is True
    assert world.log[-1] == ("ledger checkpoint", 1 + whole)
    assert [record["step"] for record in world.records] == [1, 2][: 1 + whole]


def test_a_run_that_goes_on_counts_on_and_publishes_where_it_was():
    world = World()
    pacing = SyncPacing(
        PromptStream([10, 11, 12], seed=0, accounted=Accounted(2 * BATCH)), BATCH, 4, world.clock, done=2
    )
    assert asyncio.run(run_ppo(world.parts(), pacing, KL(), 2)) == 4
    assert named(world, "publish") == [(2,), (3,), (4,)]
    assert [record["step"] for record in world.records] == [3, 4]
    assert [r.sample_id for r in world.asked[0]] == [6, 7, 8]


def test_an_adaptive_coefficient_steers_the_next_step():
    world = World()
    drive(world, steps=2, kl=AdaptiveKL(0.1, target=1.0, horizon=30.0))
    # KL 2 at target 1: error clipped to 0.2, times 3 samples of a horizon of 30
    assert [record["kl/coef"] for record in world.records] == pytest.approx([0.1, 0.1 * 1.02])


def test_a_record_holds_the_metrics_of_the_design():
    world = World()
    drive(world, steps=1)
    (record,) = world.records
    phases = ("generate", "score", "estimate", "update", "publish", "save", "other", "step")
    assert set(record) >= {
        "step",
        "reward/mean",
        "kl/mean",
        "kl/coef",
        "policy/loss",
        "policy/clip_fraction",
        "policy/ratio_mean",
        "policy/grad_norm",
        "value/loss",
        "value/explained_variance",
        "memory/policy_gib",
        "memory/rollout_gib",
        "rollout/staleness_mean",
        "rollout/staleness_max",
        "rollout/quarantined",
        "rollout/tail_share",
        "throughput/rollout_tokens_per_s",
        "throughput/train_tokens_per_s",
        "weights/version",
        "weights/publish_s",
        "weights/gib_per_s",
        *(f"time/{phase}_s" for phase in phases),
    }
    # 2**29 bytes in 0.05 s on the policy's side and 0.2 s on the engine's
    assert record["weights/gib_per_s"] == pytest.approx(2.0)
    assert record["weights/publish_s"] == 0.5
    assert record["weights/quarantined"] == 0


def test_throughput_counts_response_tokens_sampled_and_all_tokens_trained():
    world = World()
    drive(world, steps=1)
    (record,) = world.records
    # every fake response: 4 tokens of a sequence of 10
    assert record["throughput/rollout_tokens_per_s"] * record["rollout/seconds"] == pytest.approx(4 * BATCH)
    assert record["rollout/seconds"] <= record["time/generate_s"]
    assert record["throughput/train_tokens_per_s"] * record["time/update_s"] == pytest.approx(10 * BATCH)


@pytest.mark.parametrize("phase", CALLS)
@pytest.mark.parametrize("fail_at", [0, 1])
def test_an_error_in_any_part_ends_the_run_at_once(phase, fail_at):
    world = World(fail=phase, fail_at=fail_at)
    with pytest.raises(RuntimeError, match=f"{phase} broke"):
        drive(world)
    # Frozen and learning models score side by side.
    assert phase in [event[0] for event in world.log[-2 if phase == "frozen" else -1 :]]


def test_a_sample_older_than_the_pacing_allows_never_reaches_the_learners():
    world = World()

    class Hasty(SyncPacing):
        async def scored_batches(self, rollout, scorers):
            async for batch in super().scored_batches(rollout, scorers):
                yield replace(batch, version=batch.version + 2)

    pacing = Hasty(PromptStream([1, 2], seed=0), BATCH, 1, world.clock)
    pacing.max_staleness = 1
    with pytest.raises(TrainingError, match="a sample is 2 versions old, 1 are allowed"):
        asyncio.run(run_ppo(world.parts(), pacing, KL()))
    assert named(world, "estimate") == []


def test_a_failed_update_is_neither_published_nor_saved_nor_written():
    world = World(fail="update")
    with pytest.raises(RuntimeError, match="update broke"):
        drive(world)
    assert named(world, "publish") == [(0,)]
    assert world.records == []
    assert named(world, "save") == []


@pytest.mark.parametrize(
    ("phase", "error", "saved"),
    [
        ("generate", ActorError("rollout-0 was lost too often"), True),
        ("frozen", TrainingError("too many samples failed"), True),
        ("learning", ActorLost("the policy died"), False),
        ("update", ActorError("a bug"), False),
        ("publish", DataLost("its node is gone"), False),
        ("publish", ActorError("rollout-0 was lost too often"), True),
        ("publish", WeightSyncError("no engine could be verified"), True),
    ],
)
def test_when_a_run_cannot_go_on_what_was_learned_is_saved_unless_it_is_a_learner_that_is_lost(
    phase: str, error: Exception, saved: bool
):
    class Breaks(World):
        def _called(self, name, *details):
            if name == phase and self._counts.get(name, 0) == 2:
                raise error
            return super()._called(name, *details)

    world = Breaks()
    with pytest.raises(type(error)):
        drive(world, steps=4)
    dues = [due for *_, due in named(world, "save")]
    steps = 1 if phase == "publish" else 2  # the first publish comes before the first step
    assert dues == [False] * steps + [True] * saved
    if phase == "publish" and saved:  # the step is done, records and all
        assert [record["step"] for record in world.records] == [1, 2]
        assert world.log[-1] == ("ledger checkpoint", 2)


def test_a_save_that_fails_too_does_not_hide_what_ended_the_run():
    class Breaks(World):
        def _called(self, name, *details):
            if name == "publish" and self._counts.get(name, 0) == 2:
                raise WeightSyncError("no engine could be verified")
            if name == "save" and details[-1]:
                raise CheckpointError("the disk is full")
            return super()._called(name, *details)

    world = Breaks()
    with pytest.raises(WeightSyncError, match="no engine could be verified"):
        drive(world, steps=4)
    assert named(world, "ledger checkpoint") == [(1,)]


def test_no_steps_publish_once_and_write_nothing():
    world = World()
    assert drive(world, steps=0) == 0
    assert world.log == [("publish", 0)]


def test_a_hundred_steps_keep_only_their_trace_events():
    world = World(keep_log=False)
    kl = AdaptiveKL(0.1, target=2.0, horizon=1e6)
    pacing = SyncPacing(PromptStream(list(range(50)), seed=0), 64, 130, world.clock)
    sizes: list[int] = []
    write = world.write

    def measure(record):
        write(record)
        if record["step"] in (30, 130):
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])

    world.write = measure
    tracemalloc.start()
    try:
        asyncio.run(run_ppo(world.parts(), pacing, kl))
    finally:
        tracemalloc.stop()
    # 7 events of about half a KiB a step; 64 requests kept a step would be several KiB more
    assert (sizes[1] - sizes[0]) / 100 < 6000
