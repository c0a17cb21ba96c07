"""Overlapping steps: what runs beside what, and that no sample is older than it may be, whatever takes how long."""

import asyncio
from collections.abc import Sequence

import pytest
from driver_fakes import KL, World
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.driver.loop import run_ppo
from rayrlhf.driver.pacing import OverlapPacing, PromptStream, SyncPacing
from rayrlhf.driver.protocols import RolloutBatch, ScoredPart
from rayrlhf.types import RolloutInfo

IDS = [3, 1, 4, 15, 9, 26, 5]


class Slow(World):
    """Every call takes as many turns of the event loop as the next of `turns` says; engines do one thing at a time."""

    def __init__(self, turns: Sequence[int], fail: str = "", fail_at: int = 0) -> None:
        super().__init__(fail, fail_at)
        self._turns = list(turns)
        self._engines = asyncio.Lock()
        self.sampled: list[int] = []

    async def _take(self, name: str) -> None:
        self.log.append((name, "begins"))
        for _ in range(self._turns.pop(0) if self._turns else 1):
            await asyncio.sleep(0)
        self.log.append((name, "ends"))

    async def generate(self, requests):
        async with self._engines:
            version = self._version
            self.sampled.append(version)
            for half in (requests[::2], requests[1::2]):
                await self._take("sampling")
                infos = tuple(RolloutInfo(r.sample_id, r.prompt_id, 10, 4, False, version) for r in half)
                self._called("generate", len(half))
                yield RolloutBatch(infos, tuple(f"rollout {info.sample_id}" for info in infos))

    async def frozen(self, batch):
        await self._take("frozen scoring")
        self._called("frozen")
        return ScoredPart(tuple(f"frozen {handle}" for handle in batch.handles))

    async def learning(self, batch):
        await self._take("scoring")
        return await super().learning(batch)

    async def update(self, experience, step):
        await self._take("learning")
        return await super().update(experience, step)

    async def publish(self, version):
        async with self._engines:
            await self._take("publishing")
            return await super().publish(version)


def drive(world: World, staleness: int | None, steps: int = 5) -> list[dict]:
    stream = PromptStream(IDS, seed=0)
    if staleness is None:
        pacing = SyncPacing(stream, 4, steps, world.clock)
    else:
        pacing = OverlapPacing(stream, 4, steps, world.clock, staleness)
    asyncio.run(asyncio.wait_for(run_ppo(world.parts(), pacing, KL()), 20))
    return world.records


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
