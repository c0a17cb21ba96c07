"""Who is on a shared device when, without Ray: groups that write down what they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rayrlhf.actors import sharing
from rayrlhf.actors.placement import RolePlacement, shared_bundles
from rayrlhf.actors.sharing import SharedDevices, held_by
from rayrlhf.errors import ActorError, ActorLost, ActorTimeout

POLICY, ROLLOUT = (RolePlacement(role, 2, 0.5, 0.5, 1) for role in ("policy", "rollout"))


class Table:
    """Two roles on the same devices."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.devices = SharedDevices([POLICY, ROLLOUT])
        self.policy, self.rollout = self.group("policy"), self.group("rollout")

    def group(self, role: str) -> Any:
        async def call_rank(rank: int, method: str, part: str) -> None:
            self.log.append(f"{role} {part}")

        group = SimpleNamespace(role=role, ranks=1, devices=self.devices, call_rank=call_rank)
        self.devices.join(group)
        return group


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setattr(sharing, "placement_group", lambda *_, **__: object())
    return Table()


def run(work: Callable[[], Awaitable[Any]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 5))


def test_one_leaves_before_the_other_comes(table: Table) -> None:
    async def work() -> None:
        async with held_by((table.rollout, "all")):
            pass
        async with held_by((table.policy, "weights")):
            pass
        async with held_by((table.policy, "all")):
            pass

    run(work)
    assert table.log == ["rollout all", "rollout none", "policy weights", "policy all"]


def test_nobody_moves_for_the_one_who_is_there(table: Table) -> None:
    async def work() -> None:
        for _ in range(3):
            async with held_by((table.policy, "weights")):
                pass

    run(work)
    assert table.log == ["policy weights"]


def test_a_call_within_a_call_does_not_wait_for_itself(table: Table) -> None:
    async def work() -> None:
        async with held_by((table.policy, "weights"), (table.rollout, "all")), held_by((table.policy, "weights")):
            table.log.append("probe")

    run(work)
    assert table.log == ["policy weights", "rollout all", "probe"]


def test_who_needs_the_devices_waits_for_the_one_at_work(table: Table) -> None:
    async def generate() -> None:
        async with held_by((table.rollout, "all")):
            await asyncio.sleep(0.05)
            table.log.append("generated")

    async def score() -> None:
        await asyncio.sleep(0.01)
        async with held_by((table.policy, "weights")):
            table.log.append("scored")

    async def both() -> None:
        await asyncio.gather(generate(), score())

    run(both)
    assert table.log == ["rollout all", "generated", "rollout none", "policy weights", "scored"]


def test_one_that_fails_gives_its_turn_back(table: Table) -> None:
    async def work() -> None:
        with pytest.raises(KeyError):
            async with held_by((table.rollout, "all")):
                raise KeyError
        async with held_by((table.policy, "all")):
            pass

    run(work)
    assert table.log[-1] == "policy all"


def test_one_that_was_cut_short_while_it_moved_is_told_again(table: Table) -> None:
    """Nobody knows whether it has moved: the actor may have carried the call out."""

    async def work() -> None:
        async with held_by((table.policy, "all")):
            pass
        moving = asyncio.Event()

        async def hang(rank: int, method: str, part: str) -> None:
            moving.set()
            await asyncio.sleep(60)

        call, table.policy.call_rank = table.policy.call_rank, hang
        generating = asyncio.ensure_future(held_by((table.rollout, "all")).__aenter__())
        await moving.wait()
        generating.cancel()
        await asyncio.gather(generating, return_exceptions=True)
        table.policy.call_rank = call
        async with held_by((table.policy, "all")):
            table.log.append("saved")

    run(work)
    assert table.log == ["policy all", "policy all", "saved"]


@pytest.mark.parametrize("fault", [ActorLost, ActorTimeout])
def test_a_rank_that_is_gone_holds_nothing_up_and_one_that_hangs_is_ended(table: Table, fault: type[ActorLost]) -> None:
    """Killed while another role worked: the engine's own next call finds out, not the policy's."""
    ended: list[int] = []

    async def end(rank: int) -> None:
        ended.append(rank)

    async def occupy(rank: int, method: str, part: str) -> None:
        if rank == 1:
            raise fault("rollout rank 1 failed in occupy")
        table.log.append(f"rollout {part}")

    async def work() -> None:
        table.rollout.ranks, table.rollout.call_rank, table.rollout.end = 2, occupy, end
        async with held_by((table.rollout, "all")):
            pass
        async with held_by((table.policy, "all")):
            pass

    run(work)
    assert table.log == ["rollout all", "rollout none", "policy all"]
    assert ended == ([1, 1] if fault is ActorTimeout else [])


def test_a_rank_that_cannot_move_for_another_reason_ends_the_call(table: Table) -> None:
    async def occupy(rank: int, method: str, part: str) -> None:
        raise ActorError("policy rank 0 failed in occupy: out of memory")

    async def work() -> None:
        table.policy.call_rank = occupy
        with pytest.raises(ActorError, match="out of memory"):
            async with held_by((table.policy, "all")):
                pass

    run(work)


def test_roles_with_devices_of_their_own_need_no_turn(table: Table) -> None:
    async def work() -> None:
        async with held_by((table.policy, "weights")), held_by((SimpleNamespace(role="reward", devices=None), "all")):
            table.log.append("reward is at work")

    run(work)
    assert table.log == ["policy weights", "reward is at work"]


def test_a_bundle_has_room_for_a_rank_of_every_role() -> None:
    placements = [RolePlacement(role, 2, 0.5, 1 / 3, 1, {"fast": 0.1}) for role in ("policy", "value", "rollout")]
    assert shared_bundles(placements) == [pytest.approx({"CPU": 1.5, "GPU": 1, "fast": 0.3})] * 2
