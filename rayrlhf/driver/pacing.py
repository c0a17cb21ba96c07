"""When the next step's responses are drawn. `SyncPacing`: each step samples from the weights the last one left."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

from rayrlhf.data.batching import epoch_order
from rayrlhf.driver.protocols import RolloutPool, ScoredBatch, Scorers
from rayrlhf.metrics.clock import StepClock
from rayrlhf.types import SampleRequest

__all__ = ["PromptStream", "SyncPacing", "TextStream", "sample_seed"]


class PromptStream:
    """Endless prompts in a fresh shuffle each epoch, and the seed of each response drawn.

    Each prompt comes `repeats` times in a row. A seed is a hash of (run seed, epoch, prompt, sample): it does not
    depend on which engine draws it.
    """

    def __init__(self, prompt_ids: list[int], seed: int, repeats: int = 1) -> None:
        self._prompt_ids = prompt_ids
        self._seed = seed
        self._repeats = repeats
        self._drawn = 0

    def take(self, count: int) -> list[SampleRequest]:
        return [self._next() for _ in range(count)]

    def _next(self) -> SampleRequest:
        epoch, place = divmod(self._drawn // self._repeats, len(self._prompt_ids))
        if place == 0:
            self._order = epoch_order(len(self._prompt_ids), self._seed, epoch)
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


def sample_seed(*parts: int | str) -> int:
    """A seed of an engine's random stream, made of what names the response."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # engines take signed 64-bit seeds
