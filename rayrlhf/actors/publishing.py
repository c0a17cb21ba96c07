"""The two sides of a publish as the publisher sees them: the policy's ranks, and each engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rayrlhf.actors.group import ActorGroup
from rayrlhf.errors import ActorError
from rayrlhf.weights.probe import ProbeRow
from rayrlhf.weights.publish import EngineReceipt, SentBucket
from rayrlhf.weights.transports import Meeting, Transport

__all__ = ["EngineSide", "PolicySide"]


class EngineSide:
    """One engine.

    With many engines the driver's time is the number of its calls: only buckets are calls of their own. To begin needs
    none, the first bucket says it; a commit goes with the next samples, which are asked for by version.
    """

    def __init__(self, group: ActorGroup, rank: int) -> None:
        self.name = f"{group.role}-{rank}"
        self.rank = rank
        self.version: int | None = None
        self.lost: ActorError | None = None
        """what its actor failed with"""
        self.replacing: asyncio.Future[None] | None = None
        self._group = group

    async def begin_update(self, version: int) -> None:
        self.version = None

    async def load_bucket(self, ticket: dict[str, Any]) -> None:
        await self._call("load_bucket", ticket)

    async def verify(self, ticket: dict[str, Any], rows: Sequence[ProbeRow]) -> EngineReceipt:
        receipt: EngineReceipt = await self._call("verify", ticket, rows)
        return receipt

    async def commit(self, version: int) -> None:
        self.version = version

    async def _call(self, *call: Any) -> Any:
        try:
            return await self._group.call_rank(self.rank, *call)
        except ActorError as error:
            self.lost = self.lost or error
            raise


class PolicySide:
    """The policy's ranks: all take part, rank 0 speaks."""

    def __init__(self, group: ActorGroup, engines: ActorGroup, transport: Transport, workers: int) -> None:
        """`workers`: of each engine."""
        self.group = group
        self._engines = engines
        self._transport = transport
        self._workers = workers
        self._to: list[int] = []
        self._met: list[int] | None = None
        """the engines that it can reach as things are"""
        self._elsewhere = self._again = False

    def to(self, engines: Sequence[EngineSide], again: bool = False) -> PolicySide:
        """For the next publish: whom it goes to, who are all that may wait in a broadcast.

        Args:
            again: they come late to a version; the policy refuses if it has learned since.
        """
        self._to, self._again = [engine.rank for engine in engines], again
        return self

    def moved(self) -> None:
        """Actors of this role or engines have been replaced, or have failed: they have to find each other again."""
        self._met = None

    async def start_publish(self, version: int) -> SentBucket:
        if self._met != self._to:
            self._met = None
            self._elsewhere = await self._connect()
            self._met = self._to
        return _joined(await self.group.call("start_publish", version, self._elsewhere, self._again))

    async def next_bucket(self) -> SentBucket:
        return _joined(await self.group.call("next_bucket"))

    async def _connect(self) -> bool:
        """Let sender and engines meet, where they must; whether an engine needs its buckets through Ray.

        An engine that is lost is left out: the publish will find it so, and they meet again once it is replaced.
        """
        nodes = (self._engines.call_rank(rank, "node") for rank in self._to)
        home, *found = await asyncio.gather(self.group.call_rank(0, "node"), *nodes, return_exceptions=True)
        if isinstance(home, BaseException):
            raise home
        there = {rank: node for rank, node in zip(self._to, found, strict=True) if isinstance(node, str)}
        if not self._transport.meets:
            return self._transport.relayed and any(node != home for node in there.values())
        address, port = await self.group.call_rank(0, "free_address")
        world = 1 + len(there) * self._workers
        firsts = range(1, world, self._workers)
        await asyncio.gather(
            self.group.call_rank(0, "meet", Meeting(address, port, world, 0)),
            *(
                self._engines.call_rank(engine, "meet", Meeting(address, port, world, first))
                for engine, first in zip(there, firsts, strict=True)
            ),
        )
        return False

    async def probe(self, rows: Sequence[ProbeRow]) -> list[float]:
        logprobs: list[float] = (await self.group.call("probe", rows))[0]
        return logprobs


def _joined(sent: Sequence[SentBucket | None]) -> SentBucket:
    """Rank 0's bucket, with the handles that further ranks hold of the same bytes."""
    first, *others = [bucket for bucket in sent if bucket is not None]
    handles = {gpu: handle for bucket in others for gpu, handle in bucket.ticket["handles"].items()}
    return replace(first, ticket=first.ticket | {"handles": first.ticket["handles"] | handles}) if handles else first
