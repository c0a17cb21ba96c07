"""A role's actors: placed together, started in parallel, called together, each call with a deadline and an owner."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from math import floor
from time import perf_counter
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrlhf.actors.base import Whereabouts
from rayrlhf.actors.nodes import clear_after, end_process, stack_of
from rayrlhf.actors.placement import RolePlacement
from rayrlhf.actors.sharing import NEEDS, SharedDevices, held_by
from rayrlhf.driver.recovery import Deadlines
from rayrlhf.engines.distributed import Rendezvous
from rayrlhf.errors import ActorError, ActorLost, ActorTimeout, DataLost, RayRLHFError, ResourceError

__all__ = ["CLOSE_S", "ActorGroup", "KeptActors", "explain", "fetched"]


DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
# Actors that are asked to close before they are ended get this long.
CLOSE_S = 3.0
# When one rank dies the others' calls may fail before Ray knows of its death.
SAME_CAUSE_S = 2.0


class ActorGroup:
    """All ranks of one role."""

    def __init__(
        self,
        placement: RolePlacement,
        call_timeout_s: float,
        devices: SharedDevices | None = None,
        look_s: float | None = None,
    ) -> None:
        """
        Args:
            devices: that the role shares with others; None gives it its own.
            look_s: `cluster.recovery.look_s`; as `call_timeout_s` without it.
        """
        self.role = placement.role
        self.placement = placement
        self.actors: list[Any] = []
        self.devices = devices
        self.deadlines: Deadlines | None = None
        """For calls that say none of their own; `call_timeout_s` without it."""
        self._timeout, self._look_s = call_timeout_s, look_s or call_timeout_s
        self._ahead: list[list[float]] = [[] for _ in range(placement.ranks)]
        """by rank, how long each call that it has not answered may take"""
        self._where: list[Whereabouts | None] = [None] * placement.ranks
        self._replaced = 0
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
        await self._room(timeout_s)
        self._made_of = ray.remote(actor_class), list(arguments)  # once: with hundreds of ranks it takes seconds
        self.actors = [self._create(rank) for rank in range(len(arguments))]

    async def respawn(
        self, timeout_s: float, arguments: Sequence[tuple[Any, ...]] | None = None, rank: int | None = None
    ) -> None:
        """End all actors, or one, and create them anew as `spawn` did; nothing is started on them yet.

        Args:
            arguments: as of `spawn`; those of then if left out.
        """
        if arguments is not None:
            self._made_of = self._made_of[0], list(arguments)
        ranks = range(self.ranks) if rank is None else [rank]
        await asyncio.gather(*(self.end(i) for i in ranks))
        await self._room(timeout_s)  # on another node, if theirs is gone
        self._replaced += 1
        if self.devices is not None:
            self.devices.replaced(self.role)
        for i in ranks:
            self.actors[i], self._ahead[i] = self._create(i), []

    async def locate(self, rank: int | None = None) -> None:
        """Ask every rank, or one, where it is, once it has started: one that hangs later cannot say it any more."""
        if rank is None:
            self._where = await self.call("whereabouts")
        else:
            self._where[rank] = await self.call_rank(rank, "whereabouts")

    def _create(self, rank: int) -> Any:
        actor_class, arguments = self._made_of
        strategy = PlacementGroupSchedulingStrategy(self._bundles, placement_group_bundle_index=rank)
        generation = f".{self._replaced}" if self._replaced else ""  # Ray gives a name free in its own time
        return actor_class.options(
            name=f"{self.role}-{rank}{generation}",
            num_cpus=self.placement.cpus,
            num_gpus=floor(1e4 * self.placement.gpus) / 1e4,  # Ray counts in such parts; thirds must fit in a GPU
            resources=dict(self.placement.resources),
            scheduling_strategy=strategy,
            runtime_env={"env_vars": self.placement.environment()},
        ).remote(*arguments[rank])

    async def end(self, rank: int) -> None:
        """Its process, whatever it does."""
        where, self._where[rank] = self._where[rank], None
        with suppress(Exception):  # gone already
            ray.kill(self.actors[rank])
        if where is not None:
            await end_process(where, self._look_s)

    async def _room(self, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(_as_future(self._bundles.ready()), timeout_s)
        except TimeoutError:
            raise ResourceError(
                f"{self.role}: no room for {self.ranks} x {self.placement.bundles()[0]} within {timeout_s:g} s",
                f"lower cluster.{self.role}.*, or add nodes",
            ) from None

    async def rendezvous(self, device: str, deterministic: bool, timeout_s: float) -> list[Rendezvous]:
        """Where rank 0 waits for the others: one process group per role."""
        refs = [self.actors[0].meeting_place.remote()]
        address, port = (await self._wait(refs, "meeting_place", timeout_s))[0]
        threads = self.placement.threads
        return [
            Rendezvous(rank, self.ranks, address, port, device, threads, deterministic) for rank in range(self.ranks)
        ]

    async def call(
        self, method: str, *shared: Any, each: Sequence[tuple[Any, ...]] | None = None, timeout_s: float | None = None
    ) -> list[Any]:
        """Call `method` on every rank with its own arguments of `each`, then the shared ones.

        Returns:
            Results in rank order; of a method that leaves data behind, pairs of what it says and the data's handle.

        Raises:
            ActorLost, ActorTimeout, ActorError: naming role, rank and method. An error of ours that a rank raised comes
                through as itself. The first failure is raised at once: the other ranks may wait for it forever.
        """
        own = each or [()] * len(self.actors)
        needs = [(self, NEEDS[method])] if method in NEEDS else []
        async with held_by(*needs):
            refs = [getattr(a, method).remote(*mine, *shared) for a, mine in zip(self.actors, own, strict=True)]
            return await self._wait(refs, method, timeout_s)

    async def call_rank(self, rank: int, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        needs = [(self, NEEDS[method])] if method in NEEDS else []
        async with held_by(*needs):
            refs = [getattr(self.actors[rank], method).remote(*args)]
            return (await self._wait(refs, method, timeout_s, first=rank))[0]

    def close(self) -> None:
        """End every actor, and give back the bundles and what shared memory the actors leave."""
        for actor in self.actors:
            ray.kill(actor)
        clear_after([where for where in self._where if where is not None], self._look_s)
        if self.devices is not None:
            self.devices.leave(self)
        else:
            remove_placement_group(self._bundles)

    async def _wait(self, refs: list[Any], method: str, timeout_s: float | None, first: int = 0) -> list[Any]:
        """The answers to calls of the ranks from `first` on."""
        start, ranks = perf_counter(), range(first, first + len(refs))
        own = timeout_s or (self.deadlines.of(method) if self.deadlines else self._timeout)
        # An actor does one thing at a time: what it was asked before may take its own time first.
        allowed = own + max(sum(self._ahead[rank]) for rank in ranks)
        futures = [_as_future(ref[0] if isinstance(ref, list) else ref) for ref in refs]
        for rank, future in zip(ranks, futures, strict=True):
            self._ahead[rank].append(own)
            future.add_done_callback(partial(_answered, self._ahead[rank], own))
        # Those that nobody waits for any more go on: the actor is still at them when it is asked for the next thing.
        done, pending = await asyncio.wait(futures, timeout=allowed, return_when=asyncio.FIRST_EXCEPTION)
        if pending and len(futures) > 1 and any(future.exception() for future in done):
            await asyncio.wait(pending, timeout=SAME_CAUSE_S)  # one that died breaks the others' calls first
        failures = {r: f.exception() for r, f in zip(ranks, futures, strict=True) if f.done() and not f.cancelled()}
        if failed := {rank: error for rank, error in failures.items() if error is not None}:
            rank = min(failed, key=lambda r: not isinstance(failed[r], DEATHS))
            raise self._named(explain(failed[rank], f"{self.role} rank {rank} failed in {method}", self._log(rank)))
        if pending:
            rank = next(r for r, f in zip(ranks, futures, strict=True) if f in pending)
            raise self._named(await self._too_late(rank, method, allowed))
        if self.deadlines and not timeout_s:
            self.deadlines.took(method, perf_counter() - start)
        return [
            (f.result(), ref[1]) if isinstance(ref, list) else f.result() for f, ref in zip(futures, refs, strict=True)
        ]

    async def _too_late(self, rank: int, method: str, timeout_s: float) -> ActorTimeout:
        where = self._where[rank]
        stuck = f"; it is in {await stack_of(where, self._look_s)}" if where else ""
        return ActorTimeout(
            f"{self.role} rank {rank} did not finish {method} within {timeout_s:g} s{stuck}",
            "raise cluster.call_timeout_s (cluster.recovery.hang_floor_s) if that is too short; else see "
            f"logs/{self._log(rank)}.log in the folder of the run",
        )

    def _log(self, rank: int) -> str:
        return f"{self.role}-{rank}"

    def _named(self, error: BaseException) -> BaseException:
        if isinstance(error, ActorError):
            error.role = self.role
        return error


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
    if isinstance(cause, ObjectLostError):
        return DataLost(f"{where}: data that it was to work on is gone ({type(cause).__name__})", hint)
    if isinstance(error, DEATHS):
        return ActorLost(f"{where}: the actor died", hint)
    detail = f"{type(cause).__name__}: {cause}".splitlines()
    return ActorError(f"{where}: {detail[0]}", hint)


async def fetched(handle: Any, what: str, timeout_s: float) -> Any:
    """What a handle stands for.

    Raises:
        DataLost: it is gone.
        ActorTimeout: it does not come.
    """
    try:
        return await asyncio.wait_for(_as_future(handle), timeout_s)
    except TimeoutError:
        raise ActorTimeout(
            f"{what} did not come from where they are within {timeout_s:g} s", "raise cluster.call_timeout_s"
        ) from None
    except RayError as error:
        raise DataLost(
            f"{what} went with the node that held them ({type(error).__name__})",
            "start the command again: stages that are done stay done",
        ) from None


def _answered(ahead: list[float], own: float, call: asyncio.Future[Any]) -> None:
    ahead.remove(own)
    if not call.cancelled():
        call.exception()  # asyncio prints a traceback for one that nobody has looked at


def _as_future(ref: Any) -> asyncio.Future[Any]:
    return asyncio.ensure_future(_get(ref))


async def _get(ref: Any) -> Any:
    return await ref
