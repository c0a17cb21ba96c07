"""The rollout engines as actors, and the pool that deals prompts to those whose weights are verified."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
import ray

from rayrlhf.actors.base import Actor, use_rays_network
from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.relay import Arrivals
from rayrlhf.actors.sharing import held_by
from rayrlhf.data.batching import balance
from rayrlhf.driver.protocols import RolloutBatch
from rayrlhf.engines.vllm import EngineSettings, RolloutEngine
from rayrlhf.errors import WeightSyncError
from rayrlhf.models.residence import Part
from rayrlhf.types import PromptTokens, Rollout, RolloutInfo, SampleRequest
from rayrlhf.weights.probe import ProbeRow
from rayrlhf.weights.publish import EngineReceipt, Publication, SentBucket, WeightPublisher
from rayrlhf.weights.transports import TRANSPORTS, Meeting, Transport

__all__ = ["EnginePool", "ExpectedTokens", "RolloutActor"]

# A batch arrives in about so many parts: scoring starts early, and the driver is not asked too often.
PARTS = 8


class RolloutActor(Actor):
    def __init__(self, log: str, settings: EngineSettings) -> None:
        super().__init__(log)
        self._settings = settings

    def start(self, prompts: list[PromptTokens]) -> None:
        use_rays_network()
        self._arrivals = Arrivals(self._settings.transport, self._settings.run)
        self._engine = RolloutEngine(self._settings, prompts)

    def occupy(self, part: Part) -> None:
        """As of the models; an engine is there as a whole or not at all."""
        if hasattr(self, "_engine"):
            self._engine.occupy(part)

    def hold_prompts(self, prompts: list[PromptTokens]) -> None:
        """Others in place of those that it started with."""
        self._engine.hold_prompts(prompts)

    def memory_gib(self) -> float:
        """Also that of the shards' processes, where the engine has several."""
        shards = psutil.Process().children() if self._settings.tensor_parallel > 1 else []
        return super().memory_gib() + float(sum(p.memory_info().rss for p in shards)) / 2**30

    def generate(
        self, version: int, requests: Sequence[SampleRequest], at_once: int, temperature: float | None = None
    ) -> tuple[list[RolloutInfo], list[Any]]:
        """Begin to sample, and hand over the first part: see `next_part`.

        Args:
            version: that the driver has verified; naming it commits it.
        """
        self._engine.commit(version)
        self._parts: Iterator[list[Rollout]] = self._engine.generate(requests, at_once, temperature)
        return self.next_part()

    def next_part(self) -> tuple[list[RolloutInfo], list[Any]]:
        """Of the next responses that are finished: who was sampled, and the handle of their `Rollout`s in a list."""
        rollouts = next(self._parts)
        return [r.info for r in rollouts], [ray.put(rollouts)]

    def close(self) -> None:
        self._arrivals.close()
        self._engine.close()

    def meet(self, meeting: Meeting) -> None:
        self._engine.meet(meeting)

    def load_bucket(self, ticket: dict[str, Any]) -> None:
        """The first one of a version begins the update."""
        if ticket["header"]["index"] == 0:
            self._parts = iter(())  # of a batch that nobody took to its end: the engine drops the rest
            self._engine.begin_update(ticket["header"]["version"])
        self._engine.load_bucket(self._arrivals.localise(ticket))

    def verify(self, ticket: dict[str, Any], rows: Sequence[ProbeRow]) -> EngineReceipt:
        """Load the last bucket, and say what came."""
        self.load_bucket(ticket)
        return replace(self._engine.verify(rows), memory_gib=self.memory_gib())


class _Engine:
    """One engine as the publisher sees it.

    With many engines the driver's time is the number of its calls: only buckets are calls of their own. To begin needs
    none, the first bucket says it; a commit goes with the next samples, which are asked for by version.
    """

    def __init__(self, group: ActorGroup, rank: int) -> None:
        self.name = f"{group.role}-{rank}"
        self.rank = rank
        self.version: int | None = None
        self._group = group

    async def begin_update(self, version: int) -> None:
        self.version = None

    async def load_bucket(self, ticket: dict[str, Any]) -> None:
        await self._group.call_rank(self.rank, "load_bucket", ticket)

    async def verify(self, ticket: dict[str, Any], rows: Sequence[ProbeRow]) -> EngineReceipt:
        receipt: EngineReceipt = await self._group.call_rank(self.rank, "verify", ticket, rows)
        return receipt

    async def commit(self, version: int) -> None:
        self.version = version


class _Policy:
    """The policy's ranks as the publisher sees them: all take part, rank 0 speaks."""

    def __init__(self, group: ActorGroup, engines: ActorGroup, transport: Transport, workers: int) -> None:
        """`workers`: of each engine."""
        self.group = group
        self._engines = engines
        self._transport = transport
        self._workers = workers
        self._elsewhere: bool | None = None

    async def start_publish(self, version: int) -> SentBucket:
        if self._elsewhere is None:
            self._elsewhere = await self._connect()
        return _joined(await self.group.call("start_publish", version, self._elsewhere))

    async def next_bucket(self) -> SentBucket:
        return _joined(await self.group.call("next_bucket"))

    async def _connect(self) -> bool:
        """Let sender and engines meet, where they must; whether an engine needs its buckets through Ray."""
        if not self._transport.meets:
            home, *away = await self.group.call_rank(0, "node"), *await self._engines.call("node")
            return any(node != home for node in away)
        address, port = await self.group.call_rank(0, "free_address")
        world = 1 + self._engines.ranks * self._workers
        ranks = [1 + engine * self._workers for engine in range(self._engines.ranks)]
        await asyncio.gather(
            self.group.call_rank(0, "meet", Meeting(address, port, world, 0)),
            self._engines.call("meet", each=[(Meeting(address, port, world, rank),) for rank in ranks]),
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


class EnginePool:
    """Samples from, and publishes to, all engines. Implements the driver's `RolloutPool` and `Weights`."""

    def __init__(
        self,
        engines: ActorGroup,
        policy: ActorGroup,
        publisher: WeightPublisher,
        prompts: Sequence[PromptTokens],
        fixed: bool = False,
        transport: str = "shared_memory",
        workers: int = 1,
    ) -> None:
        """`workers`: of each engine.

        `fixed`: which engine draws a response, and with which others, depends on its number alone.
        """
        self._group = engines
        self._engines = [_Engine(engines, rank) for rank in range(engines.ranks)]
        self._policy = _Policy(policy, engines, TRANSPORTS[transport], workers)
        self._publisher = publisher
        self._fixed = fixed
        self._lengths = ExpectedTokens({p.prompt_id: len(p.tokens) for p in prompts})
        self._serving: list[_Engine] = []
        # Responses and new weights take turns: a publish waits for the last response, and goes before the next batch.
        self._turn = asyncio.Lock()

    async def generate(
        self, requests: Sequence[SampleRequest], temperature: float | None = None
    ) -> AsyncGenerator[RolloutBatch]:
        """The responses, some at a time as they are finished, from the engines that hold verified weights."""
        async with self._turn, held_by((self._group, "all")):
            if not self._serving:
                raise WeightSyncError("no engine holds verified weights", "publish before sampling")
            shares = self._deal(requests)
            arriving: asyncio.Queue[RolloutBatch | None] = asyncio.Queue()
            drawing = [
                asyncio.ensure_future(self._draw(engine, share, temperature, arriving))
                for engine, share in zip(self._serving, shares, strict=True)
            ]
            everyone = asyncio.gather(*drawing)
            everyone.add_done_callback(lambda _: arriving.put_nowait(None))
            try:
                held, count = list[RolloutBatch](), 0
                while (part := await arriving.get()) is not None:
                    self._lengths.learn(part.infos)
                    held.append(part)
                    count += len(part.infos)
                    # If fixed, what is scored together must not depend on who was finished first. Shares are dealt by
                    # tokens, not evenly: a little less than its part of the responses will do.
                    if not self._fixed and count * (PARTS + 1) >= len(requests):
                        yield RolloutBatch.joined(held)
                        held, count = [], 0
                await everyone
                if held:
                    yield RolloutBatch.joined(held)
            finally:
                for engine_s in drawing:  # one by one: once one has failed, `everyone` is over and cancels nothing
                    engine_s.cancel()
                # asyncio prints what nobody has looked at
                await asyncio.gather(everyone, *drawing, return_exceptions=True)

    async def _draw(
        self,
        engine: _Engine,
        share: Sequence[SampleRequest],
        temperature: float | None,
        arriving: asyncio.Queue[RolloutBatch | None],
    ) -> None:
        if not share:
            return
        parts = 1 if self._fixed else -(-PARTS // len(self._serving))
        at_once = -(-len(share) // parts)

        async def ask(*call: Any) -> RolloutBatch:
            infos, handles = await self._group.call_rank(engine.rank, *call)
            return RolloutBatch(tuple(infos), tuple(handles))

        coming = deque([asyncio.ensure_future(ask("generate", engine.version, share, at_once, temperature))])
        try:
            for _ in range(at_once, len(share), at_once):
                # Asked for before the last one is here: an engine does not wait for the driver between two parts.
                coming.append(asyncio.ensure_future(ask("next_part")))
                arriving.put_nowait(await coming.popleft())
            arriving.put_nowait(await coming.popleft())
        finally:
            for part in coming:
                part.cancel()

    def _deal(self, requests: Sequence[SampleRequest]) -> list[list[SampleRequest]]:
        """A share for each serving engine: of the requests by number, or of the tokens that they will likely take."""
        count = len(self._serving)
        if self._fixed:
            return [list(requests[i::count]) for i in range(count)]
        shares = balance([self._lengths.of(request.prompt_id) for request in requests], count)
        return [[requests[i] for i in share] for share in shares]

    async def publish(self, version: int) -> Publication:
        """Bring every engine, a quarantined one included, to `version`; only verified ones serve afterwards."""
        async with self._turn:
            self._serving = []
            async with held_by((self._policy.group, "weights"), (self._group, "all")):
                result = await self._publisher.publish(version, self._policy, self._engines)
            self._serving = [e for e in self._engines if e.name in result.committed]
            return result


class ExpectedTokens:
    """How many tokens a response and its prompt will take: as many as the last response to that prompt did."""

    def __init__(self, prompts: Mapping[int, int]) -> None:
        """`prompts`: tokens of each prompt."""
        self._prompts = prompts
        self._last: dict[int, int] = {}
        self._seen, self._total = 0, 0

    def of(self, prompt_id: int) -> int:
        usual = self._total // self._seen if self._seen else 0
        return self._prompts.get(prompt_id, 0) + self._last.get(prompt_id, usual)

    def learn(self, infos: Sequence[RolloutInfo]) -> None:
        for info in infos:
            self._last[info.prompt_id] = info.response_tokens
            self._seen, self._total = self._seen + 1, self._total + info.response_tokens
