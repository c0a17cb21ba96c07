"""The rollout engines as actors, and the pool that deals prompts to those whose weights are verified."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import psutil
import ray

from rayrlhf.actors.base import Actor
from rayrlhf.actors.group import ActorGroup
from rayrlhf.driver.protocols import RolloutBatch
from rayrlhf.engines.vllm import EngineSettings, RolloutEngine
from rayrlhf.errors import WeightSyncError
from rayrlhf.types import PromptTokens, RolloutInfo, SampleRequest
from rayrlhf.weights.probe import ProbeRow
from rayrlhf.weights.publish import EngineReceipt, Publication, SentBucket, WeightPublisher

__all__ = ["EnginePool", "RolloutActor"]


class RolloutActor(Actor):
    def __init__(self, log: str, settings: EngineSettings) -> None:
        super().__init__(log)
        self._settings = settings

    def start(self, prompts: list[PromptTokens]) -> None:
        self._engine = RolloutEngine(self._settings, prompts)

    def hold_prompts(self, prompts: list[PromptTokens]) -> None:
        """Others in place of those that it started with."""
        self._engine.hold_prompts(prompts)

    def memory_gib(self) -> float:
        """Also that of the shards' processes, where the engine has several."""
        shards = psutil.Process().children() if self._settings.tensor_parallel > 1 else []
        return super().memory_gib() + float(sum(p.memory_info().rss for p in shards)) / 2**30

    def generate(
        self, requests: Sequence[SampleRequest], temperature: float | None = None
    ) -> tuple[list[RolloutInfo], list[Any]]:
        """Who was sampled, and the handle of their `Rollout`s in a list."""
        rollouts = self._engine.generate(requests, temperature)
        return [r.info for r in rollouts], [ray.put(rollouts)]

    def close(self) -> None:
        self._engine.close()

    def begin_update(self, version: int) -> None:
        self._engine.begin_update(version)

    def load_bucket(self, ticket: dict[str, Any]) -> None:
        self._engine.load_bucket(ticket)

    def verify(self, rows: Sequence[ProbeRow]) -> EngineReceipt:
        return self._engine.verify(rows)

    def commit(self, version: int) -> None:
        self._engine.commit(version)


class _Engine:
    """One engine as the publisher sees it."""

    def __init__(self, group: ActorGroup, rank: int) -> None:
        self.name = f"{group.role}-{rank}"
        self.rank = rank
        self._group = group

    async def begin_update(self, version: int) -> None:
        await self._group.call_rank(self.rank, "begin_update", version)

    async def load_bucket(self, ticket: dict[str, Any]) -> None:
        await self._group.call_rank(self.rank, "load_bucket", ticket)

    async def verify(self, rows: Sequence[ProbeRow]) -> EngineReceipt:
        receipt: EngineReceipt = await self._group.call_rank(self.rank, "verify", rows)
        return receipt

    async def commit(self, version: int) -> None:
        await self._group.call_rank(self.rank, "commit", version)


class _Policy:
    """The policy's ranks as the publisher sees them: all take part, rank 0 speaks."""

    def __init__(self, group: ActorGroup) -> None:
        self._group = group

    async def start_publish(self, version: int) -> SentBucket:
        bucket: SentBucket = (await self._group.call("start_publish", version))[0]
        return bucket

    async def next_bucket(self) -> SentBucket:
        bucket: SentBucket = (await self._group.call("next_bucket"))[0]
        return bucket

    async def probe(self, rows: Sequence[ProbeRow]) -> list[float]:
        logprobs: list[float] = (await self._group.call("probe", rows))[0]
        return logprobs


class EnginePool:
    """Samples from, and publishes to, all engines. Implements the driver's `RolloutPool` and `Weights`."""

    def __init__(self, engines: ActorGroup, policy: ActorGroup, publisher: WeightPublisher) -> None:
        self._group = engines
        self._engines = [_Engine(engines, rank) for rank in range(engines.ranks)]
        self._policy = _Policy(policy)
        self._publisher = publisher
        self._serving: list[_Engine] = []

    async def generate(self, requests: Sequence[SampleRequest], temperature: float | None = None) -> RolloutBatch:
        """Deal the requests evenly to the engines that hold verified weights."""
        if not self._serving:
            raise WeightSyncError("no engine holds verified weights", "publish before sampling")
        shares = [requests[i :: len(self._serving)] for i in range(len(self._serving))]
        calls = [
            self._group.call_rank(engine.rank, "generate", share, temperature)
            for engine, share in zip(self._serving, shares, strict=True)
            if share
        ]
        results = await asyncio.gather(*calls)
        infos = tuple(info for infos, _ in results for info in infos)
        return RolloutBatch(infos, tuple(handle for _, handles in results for handle in handles))

    async def publish(self, version: int) -> Publication:
        """Bring every engine, a quarantined one included, to `version`; only verified ones serve afterwards."""
        self._serving = []
        result = await self._publisher.publish(version, self._policy, self._engines)
        self._serving = [e for e in self._engines if e.name in result.committed]
        return result
