"""A role's actors: placed together, started in parallel, called together, each call with a deadline and an owner."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from math import floor
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrlhf.actors.placement import RolePlacement
from rayrlhf.actors.sharing import NEEDS, SharedDevices, held_by
from rayrlhf.engines.distributed import Rendezvous
from rayrlhf.errors import ActorError, ActorTimeout, RayRLHFError, ResourceError

__all__ = ["CLOSE_S", "ActorGroup", "KeptActors", "explain"]


# Actors that are asked to close before they are ended get this long.
CLOSE_S = 3.0


class ActorGroup:
    """All ranks of one role."""

    def __init__(self, placement: RolePlacement, call_timeout_s: float, devices: SharedDevices | None = None) -> None:
        """`devices` that the role shares with others; None gives it its own."""
        self.role = placement.role
        self.placement = placement
        self.actors: list[Any] = []
        self.devices = devices
        self._timeout = call_timeout_s
        if devices is not None:
            self._bundles: PlacementGroup = devices.bundles
            devices.join(self)
        else:
            strategy = placement.strategy.upper()
            self._bundles = placement_group(placement.bundles(), strategy=strategy, name=placement.role)

    @property
    def ranks(self) -> int:
        return self.placement.ranks

    async def spawn(self, actor_class: type, arguments: Sequence[tuple[Any, ...]], timeout_s: float) -> None:
        """Create one actor per rank once there is room; they start in the background. Call `start` next."""
        try:
            await asyncio.wait_for(_as_future(self._bundles.ready()), timeout_s)
        except TimeoutError:
            raise ResourceError(
                f"{self.role}: no room for {self.ranks} x {self.placement.bundles()[0]} within {timeout_s:g} s",
                f"lower cluster.{self.role}.*, or add nodes",
            ) from None
        remote = ray.remote(actor_class)
        for rank, args in enumerate(arguments):
            strategy = PlacementGroupSchedulingStrategy(self._bundles, placement_group_bundle_index=rank)
            actor = remote.options(
                name=f"{self.role}-{rank}",
                num_cpus=self.placement.cpus,
                num_gpus=floor(1e4 * self.placement.gpus) / 1e4,  # Ray counts in such parts; thirds must fit in a GPU
                resources=dict(self.placement.resources),
                scheduling_strategy=strategy,
                runtime_env={"env_vars": self.placement.environment()},
            ).remote(*args)
            self.actors.append(actor)

    async def rendezvous(self, device: str, deterministic: bool, timeout_s: float) -> list[Rendezvous]:
        """Where rank 0 waits for the others: one process group per role."""
        refs = [self.actors[0].free_address.remote()]
        address, port = (await self._wait(refs, "free_address", timeout_s))[0]
        threads = self.placement.threads
        return [
            Rendezvous(rank, self.ranks, address, port, device, threads, deterministic) for rank in range(self.ranks)
        ]

    async def call(
        self, method: str, *shared: Any, each: Sequence[tuple[Any, ...]] | None = None, timeout_s: float | None = None
    ) -> list[Any]:
        """Call `method` on every rank with its own arguments of `each`, then the shared ones.

        Returns:
            Results in rank order.

        Raises:
            ActorTimeout, ActorError: naming role, rank and method. An error of ours that a rank raised comes through
                as itself. The first failure is raised at once: the other ranks may wait for it forever.
        """
        own = each or [()] * len(self.actors)
        needs = [(self, NEEDS[method])] if method in NEEDS else []
        async with held_by(*needs):
            refs = [getattr(a, method).remote(*mine, *shared) for a, mine in zip(self.actors, own, strict=True)]
            return await self._wait(refs, method, timeout_s or self._timeout)

    async def call_rank(self, rank: int, method: str, *args: Any) -> Any:
        refs = [getattr(self.actors[rank], method).remote(*args)]
        return (await self._wait(refs, method, self._timeout, first=rank))[0]

    def close(self) -> None:
        """End every actor and give the bundles back."""
        for actor in self.actors:
            ray.kill(actor)
        if self.devices is not None:
            self.devices.leave(self)
        else:
            remove_placement_group(self._bundles)

    async def _wait(self, refs: list[Any], method: str, timeout_s: float, first: int = 0) -> list[Any]:
        futures = [_as_future(ref) for ref in refs]
        try:
            done, pending = await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for future in futures:  # also when the caller is cancelled: nobody asks for these any more
                future.cancel()
        # All of them are asked for: asyncio prints a traceback for an exception that nobody looked at.
        failures = {rank: f.exception() for rank, f in enumerate(futures, start=first) if f in done}
        for rank, error in failures.items():
            if error is not None:
                raise explain(error, f"{self.role} rank {rank} failed in {method}", f"{self.role}-{rank}")
        if pending:
            rank = first + next(i for i, f in enumerate(futures) if f in pending)
            raise self._too_late(rank, method, timeout_s)
        return [future.result() for future in futures]

    def _too_late(self, rank: int, method: str, timeout_s: float) -> ActorTimeout:
        return ActorTimeout(
            f"{self.role} rank {rank} did not finish {method} within {timeout_s:g} s",
            "raise cluster.call_timeout_s if that is too short; else see "
            f"logs/{self.role}-{rank}.log in the folder of the run",
        )


class KeptActors:
    """Groups that a stage has left for the next one: a process that has its imports done need not do them again."""

    def __init__(self) -> None:
        self._groups: dict[str, tuple[Any, ActorGroup]] = {}

    def put(self, role: str, fit: Any, group: ActorGroup) -> None:
        """`fit` is what whoever takes the group must ask for too."""
        self._groups[role] = fit, group

    def take(self, role: str, fit: Any) -> ActorGroup | None:
        """The role's group, if there is one and it fits; one that does not is ended."""
        kept, group = self._groups.pop(role, (None, None))
        if group is not None and kept != fit:
            group.close()
            return None
        return group

    def close(self) -> None:
        """End them all; what they hold outside their own memory is given back first."""
        for _, group in self._groups.values():
            with suppress(Exception):  # Ray may be gone already; the next group must still be tried
                closing = [actor.close.remote() for actor in group.actors]
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)
                group.close()
        self._groups.clear()


def explain(error: BaseException | None, where: str, log: str) -> BaseException:
    """The error of a remote call as one of ours: `where` it happened, and the `log` of the run that says more."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayRLHFError):
        return type(cause)(f"{where}: {cause.message}", cause.hint)
    hint = f"see logs/{log}.log in the folder of the run"
    if isinstance(error, RayActorError):
        return ActorError(f"{where}: the actor died", hint)
    detail = f"{type(cause).__name__}: {cause}".splitlines()
    return ActorError(f"{where}: {detail[0]}", hint)


def _as_future(ref: Any) -> asyncio.Future[Any]:
    return asyncio.ensure_future(_get(ref))


async def _get(ref: Any) -> Any:
    return await ref
