"""What runs beside other work ends with it."""

from __future__ import annotations

import asyncio

import pytest
from driver_fakes import KL, World

from rayrlhf.driver.loop import run_ppo
from rayrlhf.driver.pacing import OverlapPacing, PromptStream, SyncPacing
from rayrlhf.driver.together import together
from rayrlhf.errors import ActorLost


def test_results_come_in_order():
    async def after(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(together(after(5), after(0), after(2))) == [5, 0, 2]


def test_the_first_failure_ends_the_others_before_it_is_raised():
    ended = []

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("waits")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ActorLost("policy rank 0 failed in update")

    with pytest.raises(ActorLost, match="policy rank 0"):
        asyncio.run(together(waits(), fails()))
    assert ended == ["waits"]


class Stuck(World):
    """Frozen scorers that are being replaced; at the second step a learner is lost meanwhile."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.scoring = where, set[int]()

    async def frozen(self, batch):
        count = self._called("frozen")
        if count == 0:
            return await super().frozen(batch)
        self.scoring.add(count)
        try:
            await asyncio.sleep(60)
        finally:
            self.scoring.discard(count)

    async def learning(self, batch):
        return await self._lost_in("learning") or await super().learning(batch)

    async def update(self, experience, step):
        return await self._lost_in("update") or await super().update(experience, step)

    async def _lost_in(self, where: str) -> None:
        if self.where == where and (self.scoring or where == "update"):
            for _ in range(20):
                await asyncio.sleep(0)
            raise ActorLost(f"policy rank 0 failed in {where}")


@pytest.mark.parametrize(("pacing", "where"), [("sync", "learning"), ("overlap", "update")])
def test_when_a_learner_is_lost_no_scoring_goes_on_beside_the_run_that_begins_again(pacing: str, where: str):
    world = Stuck(where)
    stream = PromptStream([1, 2, 3, 4, 5], seed=0)
    batches = SyncPacing(stream, 3, 3, world.clock) if pacing == "sync" else OverlapPacing(stream, 3, 3, world.clock, 1)

    async def steps() -> int:
        with pytest.raises(ActorLost, match=f"policy rank 0 failed in {where}"):
            await run_ppo(world.parts(), batches, KL())
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(steps()) == 0
    assert world.scoring == set()


@pytest.mark.parametrize("pacing", ["sync", "overlap"])
def test_a_run_that_is_asked_to_end_while_it_scores_leaves_no_scoring_behind(pacing: str):
    world = Stuck("nowhere")
    stream = PromptStream([1, 2, 3, 4, 5], seed=0)
    batches = SyncPacing(stream, 3, 3, world.clock) if pacing == "sync" else OverlapPacing(stream, 3, 3, world.clock, 1)

    async def steps() -> int:
        running = asyncio.ensure_future(run_ppo(world.parts(), batches, KL()))
        while not world.scoring:
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        world.stop.set()
        await asyncio.gather(running, return_exceptions=True)
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(steps()) == 0
    assert world.scoring == set()
