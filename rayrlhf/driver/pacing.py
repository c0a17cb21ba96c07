"""When the next step's responses are drawn.

SyncPacing      generate 0 | learn 0 | publish 1 | generate 1 | learn 1 | ...     each from the newest weights

OverlapPacing   generate 0 | generate 1        | generate 2        | ...          at most max_staleness versions old:
                           | learn 0 | publish | learn 1 | publish | ...          batch t starts once t - k is published

Frozen models score responses as they are finished. Policy and value score when the step begins that learns from them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import Any, TypeVar

from rayrlhf.data.batching import epoch_order
from rayrlhf.driver.protocols import Handle, RolloutBatch, RolloutPool, ScoredBatch, ScoredPart, Scorers
from rayrlhf.metrics.clock import StepClock
from rayrlhf.types import SampleRequest

__all__ = ["OverlapPacing", "PromptStream", "SyncPacing", "TextStream", "sample_seed"]

T = TypeVar("T")


class PromptStream:
    """Endless prompts in a fresh shuffle each epoch, and the seed of each response drawn.

    Each prompt comes `repeats` times in a row. A seed is a hash of (run seed, epoch, prompt, sample): it does not
    depend on which engine draws it.
    """

    def __init__(self, prompt_ids: list[int], seed: int, repeats: int = 1, drawn: int = 0) -> None:
        """`drawn`: responses before the first of these; it is all there is to save."""
        self._prompt_ids = prompt_ids
        self._seed = seed
        self._repeats = repeats
        self._drawn = drawn
        self._epoch: int | None = None

    def take(self, count: int) -> list[SampleRequest]:
        return [self._next() for _ in range(count)]

    def _next(self) -> SampleRequest:
        epoch, place = divmod(self._drawn // self._repeats, len(self._prompt_ids))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self._prompt_ids), self._seed, epoch)
        prompt_id = self._prompt_ids[int(self._order[place])]
        request = SampleRequest(self._drawn, prompt_id, sample_seed(self._seed, epoch, prompt_id, self._drawn))
        self._drawn += 1
        return request


class TextStream:
    """Endless blocks of pretraining text, by number, in a fresh shuffle each epoch; `drawn` is all there is to save."""

    def __init__(self, blocks: int, seed: int, drawn: int = 0) -> None:
        self._blocks = blocks
        self._seed = seed + 1  # not the order of the prompts
        self.drawn = drawn
        self._epoch: int | None = None

    def take(self, count: int) -> list[int]:
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        epoch, place = divmod(self.drawn, self._blocks)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._blocks, self._seed, epoch)
        self.drawn += 1
        return int(self._order[place])


class SyncPacing:
    """Generate and score, then hand over; nothing runs ahead."""

    max_staleness = 0

    def __init__(self, prompts: PromptStream, batch_size: int, steps: int, clock: StepClock, done: int = 0) -> None:
        """`done` of the `steps` are."""
        self._prompts = prompts
        self._batch_size = batch_size
        self._steps = range(done, steps)
        self._clock = clock

    async def scored_batches(self, rollout: RolloutPool, scorers: Scorers) -> AsyncGenerator[ScoredBatch]:
        async def score(batch: RolloutBatch) -> ScoredPart:
            frozen, learning = await asyncio.gather(scorers.frozen(batch), scorers.learning(batch))
            return ScoredPart((*frozen.handles, *learning), frozen.failed)

        for step in self._steps:
            drawing = _Drawing(score)
            with self._clock.phase("generate"):
                batch = await drawing.sample(rollout, self._prompts.take(self._batch_size))
            with self._clock.phase("score"):
                scores = await drawing.scores()
            yield ScoredBatch(batch, scores, step)


class OverlapPacing:
    """The next batches are generated while this one is learned from.

    Batch t is admitted when version t - max_staleness is published, and versions only grow: no sample that a step
    trains on is older than `max_staleness` versions, however long anything takes.
    """

    def __init__(
        self,
        prompts: PromptStream,
        batch_size: int,
        steps: int,
        clock: StepClock,
        max_staleness: int,
        done: int = 0,
    ) -> None:
        """`done` of the `steps` are."""
        self._prompts = prompts
        self._batch_size = batch_size
        self._steps = range(done, steps)
        self._clock = clock
        self.max_staleness = max_staleness

    async def scored_batches(self, rollout: RolloutPool, scorers: Scorers) -> AsyncGenerator[ScoredBatch]:
        admitted = asyncio.Semaphore(1 + self.max_staleness)
        ready: asyncio.Queue[tuple[RolloutBatch, tuple[Handle, ...]]] = asyncio.Queue()
        producer = asyncio.ensure_future(self._produce(rollout, scorers, admitted, ready))
        try:
            for step in self._steps:
                if step > self._steps.start:
                    admitted.release()  # the loop asks for more once it has published version `step`
                with self._clock.phase("generate"):
                    batch, frozen = await _get(ready, producer)
                with self._clock.phase("score"):
                    learning = await scorers.learning(batch)
                yield ScoredBatch(batch, (*frozen, *learning), step)
        finally:
            producer.cancel()
            await asyncio.gather(producer, return_exceptions=True)

    async def _produce(
        self,
        rollout: RolloutPool,
        scorers: Scorers,
        admitted: asyncio.Semaphore,
        ready: asyncio.Queue[tuple[RolloutBatch, tuple[Handle, ...]]],
    ) -> None:
        for _ in self._steps:
            await admitted.acquire()
            drawing = _Drawing(scorers.frozen)
            with self._clock.background("generate"):
                batch = await drawing.sample(rollout, self._prompts.take(self._batch_size))
            ready.put_nowait((batch, await drawing.scores()))


class _Drawing:
    """One batch: responses as they are finished, scored together whenever the scorers are free."""

    def __init__(self, score: Callable[[RolloutBatch], Coroutine[Any, Any, ScoredPart]]) -> None:
        self._score = score
        self._waiting: list[RolloutBatch] = []
        self._scoring: asyncio.Task[ScoredPart] | None = None
        self._scores: list[Handle] = []

    async def sample(self, rollout: RolloutPool, requests: Sequence[SampleRequest]) -> RolloutBatch:
        """Raises what sampling or scoring raised."""
        start, parts = perf_counter(), list[RolloutBatch]()
        try:
            async with aclosing(rollout.generate(requests)) as arriving:
                async for part in arriving:
                    parts.append(part)
                    self._waiting.append(part)
                    if self._scoring is None or self._scoring.done():
                        self._next()
        except BaseException:
            if self._scoring is not None:
                self._scoring.cancel()
                await asyncio.gather(self._scoring, return_exceptions=True)
            raise
        return RolloutBatch.joined(parts, perf_counter() - start)

    async def scores(self) -> tuple[Handle, ...]:
        """Of all of them; those that are not scored yet come last."""
        while self._scoring is not None:
            await asyncio.wait([self._scoring])
            self._next()
        return tuple(self._scores)

    def _next(self) -> None:
        """Take in what is scored, and let what waits be scored."""
        if self._scoring is not None:
            self._scores.extend(self._scoring.result().handles)
        waiting, self._waiting = self._waiting, []
        self._scoring = asyncio.ensure_future(self._score(RolloutBatch.joined(waiting))) if waiting else None


async def _get(queue: asyncio.Queue[T], producer: asyncio.Future[None]) -> T:
    """The queue's next, or the error that ended its producer."""
    getting = asyncio.ensure_future(queue.get())
    waiting: list[asyncio.Future[Any]] = [getting, producer]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if not getting.done():
        getting.cancel()
        producer.result()
    return await getting


def sample_seed(*parts: int | str) -> int:
    """A seed of an engine's random stream, made of what names the response."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # engines take signed 64-bit seeds
