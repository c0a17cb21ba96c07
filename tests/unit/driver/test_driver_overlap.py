"""Overlapping steps: what runs beside what, and that no sample is older than it may be, whatever takes how long."""

import asyncio
from collections.abc import Collection, Sequence

import pytest
from driver_fakes import KL, World
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.checkpoint.ledger import Accounted
from rayrlhf.driver.loop import run_ppo
from rayrlhf.driver.pacing import OverlapPacing, PromptStream, SyncPacing
from rayrlhf.driver.protocols import RolloutBatch, ScoredBatch, ScoredPart
from rayrlhf.types import RolloutInfo

IDS = [3, 1, 4, 15, 9, 26, 5]


class Slow(World):
    """Every call takes as many turns of the event loop as the next of `turns` says; engines do one thing at a time.

    Samples of `failing` cannot be scored. Where the next of `lost` says so an engine is lost in the middle of a batch:
    the others wait for a new one, and new weights may come before the rest is drawn.
    """

    def __init__(
        self,
        turns: Sequence[int],
        fail: str = "",
        fail_at: int = 0,
        failing: Collection[int] = (),
        lost: Sequence[bool] = (),
    ) -> None:
        super().__init__(fail, fail_at)
        self._turns = list(turns)
        self._failing = failing
        self._lost = list(lost)
        self._engines = asyncio.Lock()
        self.sampled: list[int] = []
        self.scored_as_they_are: list[list[int]] = []
        self.learned: list[ScoredBatch] = []

    async def _take(self, name: str) -> None:
        self.log.append((name, "begins"))
        for _ in range(self._turns.pop(0) if self._turns else 1):
            await asyncio.sleep(0)
        self.log.append((name, "ends"))

    async def generate(self, requests):
        halves = [requests[::2], requests[1::2]]
        while halves:
            async with self._engines:
                version = self._version
                self.sampled.append(version)
                while halves:
                    half = halves.pop(0)
                    await self._take("sampling")
                    infos = tuple(RolloutInfo(r.sample_id, r.prompt_id, 10, 4, False, version) for r in half)
                    self._called("generate", len(half))
                    yield RolloutBatch(infos, tuple(f"rollout {info.sample_id}" for info in infos))
                    if self._lost and self._lost.pop(0):
                        break
            await self._take("starting an engine")

    async def frozen(self, batch):
        await self._take("frozen scoring")
        self._called("frozen")
        failed = {info.sample_id: "no" for info in batch.infos if info.sample_id in self._failing}
        return ScoredPart(tuple(f"frozen {handle}" for handle in batch.handles), failed)

    async def learning(self, batch):
        await self._take("scoring")
        self.scored_as_they_are.append([info.sample_id for info in batch.infos])
        return await super().learning(batch)

    async def estimate(self, batch, kl_coef):
        self.learned.append(batch)
        return await super().estimate(batch, kl_coef)

    async def update(self, experience, step):
        await self._take("learning")
        return await super().update(experience, step)

    async def publish(self, version):
        async with self._engines:
            await self._take("publishing")
            return await super().publish(version)


def drive(world: World, staleness: int | None, steps: int = 5, done: int = 0, drawn: int = 0) -> list[dict]:
    """From step `done` on, which `drawn` samples went into."""
    how = PromptStream(IDS, seed=0, accounted=Accounted(drawn)), 4, steps, world.clock
    if staleness is None:
        pacing = SyncPacing(*how, done, max_failed=20)
    else:
        pacing = OverlapPacing(*how, staleness, done, max_failed=20)
    asyncio.run(asyncio.wait_for(run_ppo(world.parts(), pacing, KL(), done), 20))
    return world.records


def trained(batch: ScoredBatch) -> list[int]:
    return sorted(info.sample_id for info in batch.rollouts.infos)


def quarantined(batch: ScoredBatch) -> list[int]:
    return sorted(sample.sample_id for sample in batch.quarantined)


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_no_sample_is_older_than_k_versions_and_each_is_trained_on_once_in_order(turns, staleness):
    world = Slow(turns)
    records = drive(world, staleness, steps=6)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record["rollout/staleness_max"] <= staleness for record in records)
    assert all(step - version <= staleness for step, version in enumerate(world.sampled))
    estimated = [event for event in world.log if event[0] == "estimate"]
    rollouts = [[d for d in event[1:] if str(d).startswith("rollout ")] for event in estimated]
    # half a batch at a time, even numbers first
    assert rollouts == [[f"rollout {4 * s + i}" for i in (0, 2, 1, 3)] for s in range(6)]


@given(
    turns=st.lists(st.integers(0, 30), max_size=80),
    staleness=st.integers(0, 3),
    failing=st.sets(st.integers(0, 60), max_size=15),
    lost=st.lists(st.booleans(), max_size=30),
    done=st.integers(0, 4),
)
@settings(max_examples=200, deadline=None)
def test_no_sample_is_older_than_k_versions_when_samples_fail_engines_are_lost_and_a_run_is_resumed(
    turns: list[int], staleness: int, failing: set[int], lost: list[bool], done: int
) -> None:
    world = Slow(turns, failing=failing, lost=lost)
    records = drive(world, staleness, steps=done + 5, done=done, drawn=5 * done)
    assert [record["step"] for record in records] == list(range(done + 1, done + 6))
    for step, batch in enumerate(world.learned, start=done):
        assert batch.version == step
        assert all(0 <= step - info.version <= staleness for info in batch.rollouts.infos)
    # Nobody is left out but who failed, and those that are drawn in their place are the next in line.
    numbers = iter(range(5 * done, 1000))
    for batch in world.learned:
        kept, out = list[int](), list[int]()
        while len(kept) < 4:
            number = next(numbers)
            (out if number in failing else kept).append(number)
        assert (trained(batch), quarantined(batch)) == (kept, out)


@given(st.lists(st.integers(0, 30), max_size=60))
@settings(max_examples=50, deadline=None)
def test_with_k_1_each_batch_is_sampled_one_version_early_whatever_the_timing(turns):
    world = Slow(turns)
    drive(world, 1, steps=5)
    assert world.sampled == [0, 0, 1, 2, 3]


@given(st.lists(st.integers(0, 30), max_size=60))
@settings(max_examples=50, deadline=None)
def test_with_k_0_the_same_things_happen_in_the_same_order_as_in_sync(turns):
    logs = []
    for staleness in (None, 0):
        world = Slow([])
        drive(world, staleness)
        order = [e for e in world.log if e[0] in ("generate", "estimate", "update", "publish", "write")]
        # Models that learn score halves as they come, or the whole: not what they score, but in how many calls.
        logs.append([(e[0], *(d for d in e[1:] if not str(d).startswith(("frozen", "learning")))) for e in order])
        assert world.sampled == [0, 1, 2, 3, 4]
    assert logs[0] == logs[1]
    delayed = Slow(turns)
    drive(delayed, 0)
    assert delayed.sampled == [0, 1, 2, 3, 4]


@given(
    turns=st.lists(st.integers(0, 30), max_size=60),
    failing=st.sets(st.integers(0, 30), max_size=9),
    lost=st.lists(st.booleans(), max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_with_k_0_the_same_samples_are_drawn_left_out_and_trained_on_as_in_sync(
    turns: list[int], failing: set[int], lost: list[bool]
) -> None:
    """Each drawn by the version that learns from it, and scored by it: in which calls is for each pacing to say."""
    done = []
    for staleness in (None, 0):
        world = Slow(turns, failing=failing, lost=lost)
        drive(world, staleness)
        for step, batch in enumerate(world.learned):
            assert {info.version for info in batch.rollouts.infos} == {batch.version} == {step}
        scored = [sample for samples in world.scored_as_they_are for sample in samples]
        assert all(scored.count(sample) == 1 for batch in world.learned for sample in trained(batch))
        done.append([(trained(batch), quarantined(batch)) for batch in world.learned])
    assert done[0] == done[1]


def test_the_next_batch_is_sampled_while_this_one_is_learned_from():
    world = Slow([1] * 3 + [20] * 100)
    drive(world, 1)
    begins, ends = world.log.index(("learning", "begins")), world.log.index(("learning", "ends"))
    assert ("sampling", "begins") in world.log[:ends]
    assert any(event[0] == "generate" for event in world.log[begins:ends])


def test_frozen_models_score_the_first_responses_before_the_last_are_finished():
    for staleness in (None, 1):
        world = Slow([1, 1, 30, 1])
        drive(world, staleness, steps=1)
        finished = [i for i, event in enumerate(world.log) if event[0] == "generate"]
        assert world.log.index(("frozen scoring", "begins")) < finished[1]


@pytest.mark.parametrize("phase", ["generate", "frozen", "learning", "update", "publish"])
@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_an_error_anywhere_ends_the_run_and_leaves_nothing_running(phase, fail_at):
    world = Slow([3] * 100, fail=phase, fail_at=fail_at)

    async def run() -> int:
        pacing = OverlapPacing(PromptStream(IDS, seed=0), 4, 5, world.clock, 1)
        try:
            with pytest.raises(RuntimeError, match=f"{phase} broke"):
                await asyncio.wait_for(run_ppo(world.parts(), pacing, KL()), 20)
        finally:
            await asyncio.sleep(0)
            left = len(asyncio.all_tasks()) - 1
        return left

    assert asyncio.run(run()) == 0


def test_steps_that_overlap_take_less_time_than_steps_that_do_not():
    """In seconds: sampling 40 ms, learning 40 ms, five steps; at best 240 in place of 400."""

    class Timed(World):
        async def generate(self, requests):
            await asyncio.sleep(0.04)
            async for batch in super().generate(requests):
                yield batch

        async def update(self, experience, step):
            await asyncio.sleep(0.04)
            return await super().update(experience, step)

    took = {}
    for staleness in (None, 1):
        world = Timed()
        took[staleness] = sum(record["time/step_s"] for record in drive(world, staleness))
    assert took[None] >= 0.4
    assert took[1] < 0.8 * took[None]
