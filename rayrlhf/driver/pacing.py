"""When the next step's responses are drawn.

SyncPacing      generate 0 | learn 0 | publish 1 | generate 1 | learn 1 | ...     each from the newest weights

OverlapPacing   generate 0 | generate 1        | generate 2        | ...          at most max_staleness versions old:
                           | learn 0 | publish | learn 1 | publish | ...          batch t starts once t - k is published

Frozen models score responses as they are finished. Policy and value score when the step begins that learns from them.
A sample that cannot be scored is quarantined, and another is drawn: every step learns from a whole batch.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeVar

from rayrlhf.checkpoint.ledger import Accounted
from rayrlhf.data.batching import SampleOrder, epoch_order
from rayrlhf.driver.protocols import Handle, Quarantined, RolloutBatch, RolloutPool, ScoredBatch, ScoredPart, Scorers
from rayrlhf.driver.together import together
from rayrlhf.errors import TrainingError
from rayrlhf.metrics.clock import StepClock
from rayrlhf.metrics.throughput import later
from rayrlhf.types import RolloutInfo, SampleRequest

__all__ = ["OverlapPacing", "PromptStream", "SyncPacing", "TextStream", "sample_seed"]

T = TypeVar("T")
Score = Callable[[RolloutBatch], Coroutine[Any, Any, ScoredPart]]
NOTHING = Accounted()
# Characters that are kept of why a sample could not be scored.
REASON = 200
BUG = "this is a mistake of the rollout pool, not of the config: please report it"


class PromptStream:
    """Endless prompts in a fresh shuffle each epoch, and the seed of each response drawn.

    Samples are numbered; those that are accounted for already are left out. A batch that an epoch's last prompts do
    not fill goes on with the next epoch's first. Each prompt comes `repeats` times in a row. A seed is a hash of (run
    seed, epoch, prompt, sample): it does not depend on which engine draws it.
    """

    def __init__(self, prompt_ids: Sequence[int], seed: int, repeats: int = 1, accounted: Accounted = NOTHING) -> None:
        """`accounted`: all there is to save."""
        self.repeats = repeats
        self._seed = seed
        self._order = SampleOrder(prompt_ids, seed, repeats)
        self._numbers = (n for n in itertools.count(accounted.frontier) if n not in accounted)

    def take(self, count: int) -> list[SampleRequest]:
        return [self._request(number) for number in itertools.islice(self._numbers, count)]

    def _request(self, number: int) -> SampleRequest:
        epoch, prompt_id, _ = self._order(number)
        return SampleRequest(number, prompt_id, sample_seed(self._seed, epoch, prompt_id, number))


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


class _Pacing:
    def __init__(
        self, prompts: PromptStream, batch_size: int, steps: int, clock: StepClock, done: int = 0, max_failed: int = 1
    ) -> None:
        """`done` of the `steps` are; of a step's samples, `max_failed` may not be scored."""
        self._prompts = prompts
        self._batch_size = batch_size
        self._steps = range(done, steps)
        self._clock = clock
        self._max_failed = max_failed

    def _drawing(self, score: Score) -> _Drawing:
        return _Drawing(self._prompts, self._batch_size, self._max_failed, score)


class SyncPacing(_Pacing):
    """Generate and score, then hand over; nothing runs ahead."""

    max_staleness = 0

    async def scored_batches(self, rollout: RolloutPool, scorers: Scorers) -> AsyncGenerator[ScoredBatch]:
        async def score(batch: RolloutBatch) -> ScoredPart:
            async def as_they_are_now() -> ScoredPart:
                return ScoredPart(await scorers.learning(batch))

            frozen, learning_s = await together(scorers.frozen(batch), as_they_are_now())
            return replace(frozen, handles=(*frozen.handles, *learning_s.handles))

        for step in self._steps:
            drawing = self._drawing(score)
            while drawing.missing:
                with self._clock.phase("generate"):
                    await drawing.sample(rollout)
                with self._clock.phase("score"):
                    await drawing.scored()
            yield drawing.batch(step)


class OverlapPacing(_Pacing):
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
        max_failed: int = 1,
    ) -> None:
        super().__init__(prompts, batch_size, steps, clock, done, max_failed)
        self.max_staleness = max_staleness

    async def scored_batches(self, rollout: RolloutPool, scorers: Scorers) -> AsyncGenerator[ScoredBatch]:
        admitted = asyncio.Semaphore(1 + self.max_staleness)
        ready: asyncio.Queue[ScoredBatch] = asyncio.Queue()
        producer = asyncio.ensure_future(self._produce(rollout, scorers, admitted, ready))
        try:
            for step in self._steps:
                if step > self._steps.start:
                    admitted.release()  # the loop asks for more once it has published version `step`
                with self._clock.phase("generate"):
                    batch = await _get(ready, producer)
                with self._clock.phase("score"):
                    learning = await scorers.learning(batch.rollouts)
                yield replace(batch, scores=(*batch.scores, *learning))
        finally:
            producer.cancel()
            await asyncio.gather(producer, return_exceptions=True)

    async def _produce(
        self, rollout: RolloutPool, scorers: Scorers, admitted: asyncio.Semaphore, ready: asyncio.Queue[ScoredBatch]
    ) -> None:
        """One batch after the other, each with its replacements: samples count in the order drawn."""
        for step in self._steps:
            await admitted.acquire()
            drawing = self._drawing(scorers.frozen)
            while drawing.missing:
                with self._clock.background("generate"):
                    await drawing.sample(rollout)
                await drawing.scored()
            ready.put_nowait(drawing.batch(step))


class _Drawing:
    """One batch: responses as they are finished, scored together whenever the scorers are free.

    What cannot be scored is left out, and with it all samples of its group: the next call of `sample` draws others.
    """

    def __init__(self, prompts: PromptStream, size: int, max_failed: int, score: Score) -> None:
        self._prompts = prompts
        self._size = size
        self._max_failed = max_failed
        self._score = score
        self._drawn = RolloutBatch((), ())
        self._waiting: list[RolloutBatch] = []
        self._scoring: asyncio.Task[ScoredPart] | None = None
        self._scores: list[Handle] = []
        self._failed: dict[int, str] = {}

    @property
    def missing(self) -> int:
        """Samples that the batch still lacks."""
        return self._size - len(self.batch(0).rollouts.infos)

    async def sample(self, rollout: RolloutPool) -> None:
        """Draw what the batch lacks.

        Raises:
            TrainingError: too many could not be scored, or the responses are not those that were asked for.
        """
        start, parts, requests = perf_counter(), [self._drawn], self._prompts.take(self.missing)
        try:
            async with aclosing(rollout.generate(requests)) as arriving:
                async for part in arriving:
                    parts.append(replace(part, infos=later(part.infos, self._drawn.seconds)))
                    self._waiting.append(part)
                    if self._scoring is None or self._scoring.done():
                        self._next()
            came = Counter((info.sample_id, info.prompt_id) for part in parts[1:] for info in part.infos)
            came.subtract((request.sample_id, request.prompt_id) for request in requests)
            if wrong := sorted(sample for sample, count in came.items() if count):
                raise TrainingError(f"the engines did not answer once, as asked: (sample, prompt) {wrong}", BUG)
        except BaseException:
            await self._drop()
            raise
        self._drawn = RolloutBatch.joined(parts, self._drawn.seconds + perf_counter() - start)

    async def scored(self) -> None:
        """Wait for the scores of all that is sampled; raises as `sample` does."""
        try:
            while self._scoring is not None:
                await asyncio.wait([self._scoring])
                self._next()
        except BaseException:
            await self._drop()
            raise

    async def _drop(self) -> None:
        """Nobody waits for these scores any more."""
        if self._scoring is not None:
            self._scoring.cancel()
            await asyncio.gather(self._scoring, return_exceptions=True)

    def batch(self, version: int) -> ScoredBatch:
        """What there is."""
        together, kept, out = self._prompts.repeats, list[RolloutInfo](), list[Quarantined]()
        groups = {sample // together: why for sample, why in self._failed.items()}
        for info in self._drawn.infos:
            if (why := groups.get(info.sample_id // together)) is None:
                kept.append(info)
            else:
                why = self._failed.get(info.sample_id, f"its group: {why}")
                out.append(Quarantined(info.sample_id, info.prompt_id, why))
        return ScoredBatch(replace(self._drawn, infos=tuple(kept)), tuple(self._scores), version, tuple(out))

    def _next(self) -> None:
        """Take in what is scored, and let what waits be scored."""
        if self._scoring is not None:
            part = self._scoring.result()
            self._scores.extend(part.handles)
            self._failed |= {sample: " ".join(why.split())[:REASON] for sample, why in part.failed.items()}
            self._check_failed()
        waiting, self._waiting = self._waiting, []
        self._scoring = asyncio.ensure_future(self._score(RolloutBatch.joined(waiting))) if waiting else None

    def _check_failed(self) -> None:
        if len(self._failed) > self._max_failed:
            reason, count = Counter(self._failed.values()).most_common(1)[0]
            raise TrainingError(
                f"{len(self._failed)} samples of a step of {self._size} could not be scored, {self._max_failed} may; "
                f"{count} times: {reason}",
                "mend what scores them (logs/ has what each role says) or raise ppo.max_failed_share, then --resume",
            )


async def _get(queue: asyncio.Queue[T], producer: asyncio.Future[None]) -> T:
    """The queue's next, or the error that ended its producer."""
    getting = asyncio.ensure_future(queue.get())
    waiting: list[asyncio.Future[Any]] = [getting, producer]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done():
            producer.result()
        return await getting
    finally:
        getting.cancel()


def sample_seed(*parts: int | str) -> int:
    """A seed of an engine's random stream, made of what names the response."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # engines take signed 64-bit seeds
