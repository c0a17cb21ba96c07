"""When the next step's responses are drawn. `SyncPacing`: each step samples from the weights the last one left."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

from rayrlhf.data.batching import epoch_order
from rayrlhf.driver.protocols import RolloutPool, ScoredBatch, Scorers
from rayrlhf.metrics.clock import StepClock
from rayrlhf.types import SampleRequest

__all__ = ["PromptStream", "SyncPacing"]


class PromptStream:
    """Endless prompts in a fresh shuffle each epoch, and the seed of each response drawn.

    A seed is a hash of (run seed, epoch, prompt, sample): it does not depend on which engine draws it.
    """

    def __init__(self, prompt_ids: list[int], seed: int) -> None:
        self._prompt_ids = prompt_ids
        self._seed = seed
        self._drawn = 0

    def take(self, count: int) -> list[SampleRequest]:
        return [self._next() for _ in range(count)]

    def _next(self) -> SampleRequest:
        epoch, place = divmod(self._drawn, len(self._prompt_ids))
        if place == 0:
            self._order = epoch_order(len(self._prompt_ids), self._seed, epoch)
        prompt_id = self._prompt_ids[int(self._order[place])]
        request = SampleRequest(self._drawn, prompt_id, _seed(self._seed, epoch, prompt_id, self._drawn))
        self._drawn += 1
        return request


class SyncPacing:
    """Generate, then score, then hand over; nothing runs ahead."""

    def __init__(self, prompts: PromptStream, batch_size: int, steps: int, clock: StepClock) -> None:
        self._prompts = prompts
        self._batch_size = batch_size
        self._steps = steps
        self._clock = clock

    async def scored_batches(self, rollout: RolloutPool, scorers: Scorers) -> AsyncIterator[ScoredBatch]:
        for _ in range(self._steps):
            with self._clock.phase("generate"):
                batch = await rollout.generate(self._prompts.take(self._batch_size))
            with self._clock.phase("score"):
                scores = await scorers.score(batch)
            yield ScoredBatch(batch, scores)


def _seed(*parts: int) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # engines take signed 64-bit seeds
