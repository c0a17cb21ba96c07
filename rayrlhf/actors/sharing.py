"""Roles on the same devices, which they hold in turns.

    cluster.shared: [[policy, rollout]]

    publish     policy: weights   rollout: all
    generate    policy: none      rollout: all
    score       policy: weights   rollout: none
    update      policy: all       rollout: none      (cluster.shared with value: after it, value: all)

Whoever works says what it needs (`SharedDevices.held_by`); what the others have there leaves for the host first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rayrlhf.actors.placement import RolePlacement, shared_bundles
from rayrlhf.errors import ActorLost, ActorTimeout
from rayrlhf.models.residence import Part

if TYPE_CHECKING:
    from rayrlhf.actors.group import ActorGroup

__all__ = ["NEEDS", "SharedDevices", "held_by"]

# What a role's methods need of its model; those that are not named need nothing.
NEEDS: Mapping[str, Part] = {
    **dict.fromkeys(("score", "probe", "save", "text_loss", "choice_logprobs"), "weights"),
    **dict.fromkeys(
        ("start", "reload", "update", "save_average", "save_state", "load_state", "record_before", "record_after"),
        "all",
    ),
}
SIZE: Mapping[Part, int] = {"none": 0, "weights": 1, "all": 2}


class SharedDevices:
    """The devices of one set of `cluster.shared`: a bundle for each rank, with room for that rank of every role."""

    def __init__(self, placements: Sequence[RolePlacement]) -> None:
        self.bundles: PlacementGroup = placement_group(
            shared_bundles(placements),
            strategy=placements[0].strategy.upper(),
            name="+".join(placement.role for placement in placements),
        )
        self._groups: dict[str, ActorGroup] = {}
        self._there: dict[str, Part | None] = {}
        """None: it was told to move and has not answered, so nobody knows"""
        self._workers = 0
        self._changed = asyncio.Condition()

    @property
    def roles(self) -> list[str]:
        return sorted(self._groups)

    def join(self, group: ActorGroup) -> None:
        self._groups[group.role] = group
        self._there[group.role] = "none"

    def leave(self, group: ActorGroup) -> None:
        """Gives the bundles back with the last one."""
        del self._groups[group.role], self._there[group.role]
        if not self._groups:
            remove_placement_group(self.bundles)

    def replaced(self, role: str) -> None:
        """Ranks of the role are new: what of it is there has to be said to all of them again."""
        self._there[role] = None

    @asynccontextmanager
    async def held_by(self, needs: Mapping[str, Part]) -> AsyncIterator[None]:
        """Wait for a turn, and let exactly these parts of these roles be on the devices meanwhile.

        Whoever needs no more than what those at work have there joins them: a call within a call does not wait for
        itself.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: not self._workers or self._covers(needs))
            if not self._workers:
                await self._move(needs)
            self._workers += 1
        try:
            yield
        finally:
            async with self._changed:
                self._workers -= 1
                self._changed.notify_all()

    def _covers(self, needs: Mapping[str, Part]) -> bool:
        return all((there := self._there[role]) and SIZE[part] <= SIZE[there] for role, part in needs.items())

    async def _move(self, needs: Mapping[str, Part]) -> None:
        """What is not needed goes before what is needed comes: there may not be room for both."""
        wanted: dict[str, Part] = {role: needs.get(role, "none") for role in self._groups}
        changed = {role: part for role, part in wanted.items() if part != self._there[role]}
        for grows in (False, True):
            # One that nobody knows of may be there as a whole: it goes with those that leave, if it is to.
            moving = [r for r, part in changed.items() if (SIZE[part] > SIZE[self._there[r] or "none"]) == grows]
            await asyncio.gather(*(self._occupy(role, changed.pop(role)) for role in moving))

    async def _occupy(self, role: str, part: Part) -> None:
        """A rank that is gone has nothing here, and whoever calls it next finds out; one that hangs has to go."""
        self._there[role] = None
        group = self._groups[role]
        calls = (group.call_rank(rank, "occupy", part) for rank in range(group.ranks))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, ActorTimeout):
                await group.end(rank)
            elif isinstance(outcome, BaseException) and not isinstance(outcome, ActorLost):
                raise outcome
        self._there[role] = part


@asynccontextmanager
async def held_by(*needs: tuple[ActorGroup, Part]) -> AsyncIterator[None]:
    """A turn on the devices of all these roles at once; roles with devices of their own need none."""
    by_devices: dict[SharedDevices, dict[str, Part]] = {}
    for group, part in needs:
        if group.devices is not None:
            by_devices.setdefault(group.devices, {})[group.role] = part
    async with AsyncExitStack() as turns:
        # All wait in the same order, so that no two wait for each other.
        for devices in sorted(by_devices, key=lambda d: d.roles):
            await turns.enter_async_context(devices.held_by(by_devices[devices]))
        yield
