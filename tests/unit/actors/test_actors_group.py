"""Deadlines of calls to actors, without Ray: calls are futures that the test answers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ObjectLostError

from rayrlhf.actors import group as group_module
from rayrlhf.actors.group import ActorGroup, fetched
from rayrlhf.actors.placement import RolePlacement
from rayrlhf.errors import ActorTimeout, DataLost


class Actor:
    """Does one thing at a time, each when the test says so."""

    def __init__(self) -> None:
        self.calls: list[asyncio.Future[Any]] = []
        self.work = SimpleNamespace(remote=self._call)

    def _call(self, *args: Any) -> asyncio.Future[Any]:
        self.calls.append(asyncio.get_running_loop().create_future())
        return self.calls[-1]


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> ActorGroup:
    monkeypatch.setattr(group_module, "placement_group", lambda *_, **__: object())
    made = ActorGroup(RolePlacement("rollout", 1, 0.5, 0.0, 1), call_timeout_s=0.2)
    made.actors = [Actor()]
    return made


def test_what_an_actor_was_asked_before_has_its_own_time_even_when_nobody_waits_for_it_any_more(group: ActorGroup):
    """Responses under way are dropped when a learner is lost, and the engine must not count as hanging for them."""

    async def steps() -> Any:
        dropped = asyncio.ensure_future(group.call_rank(0, "work"))
        await asyncio.sleep(0.01)
        dropped.cancel()
        await asyncio.gather(dropped, return_exceptions=True)
        next_one = asyncio.ensure_future(group.call_rank(0, "work"))
        await asyncio.sleep(0.3)  # more than one call may take, less than two
        first, second = group.actors[0].calls
        first.set_result("late")
        second.set_result("in time")
        return await next_one

    assert asyncio.run(steps()) == "in time"


def test_an_answered_call_leaves_the_next_one_no_more_time_than_its_own(group: ActorGroup):
    async def steps() -> None:
        for outcome in (None, ValueError("a bug")):
            call = asyncio.ensure_future(group.call_rank(0, "work"))
            await asyncio.sleep(0.01)
            answer = group.actors[0].calls[-1]
            answer.set_exception(outcome) if outcome else answer.set_result(1)
            await asyncio.gather(call, return_exceptions=True)
        start = asyncio.get_running_loop().time()
        with pytest.raises(ActorTimeout, match=r"rollout rank 0 did not finish work within 0\.2 s"):
            await group.call_rank(0, "work")
        assert asyncio.get_running_loop().time() - start < 0.35

    asyncio.run(steps())


def test_data_that_is_gone_is_one_message():
    async def gone() -> None:
        raise ObjectLostError("00ff", None, "")

    with pytest.raises(DataLost, match=r"eval: scores went with the node that held them \(ObjectLostError\)"):
        asyncio.run(fetched(gone(), "eval: scores", 1.0))


def test_data_that_does_not_come_is_one_message():
    with pytest.raises(ActorTimeout, match=r"eval: scores did not come from where they are within 0\.05 s"):
        asyncio.run(fetched(asyncio.sleep(9), "eval: scores", 0.05))
