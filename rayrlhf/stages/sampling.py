"""Sampling outside PPO: responses of a published policy, brought to the driver as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rayrlhf.actors.group import fetched
from rayrlhf.actors.pool import EnginePool
from rayrlhf.driver.protocols import RolloutBatch
from rayrlhf.types import Rollout, SampleRequest

__all__ = ["Answer", "answers", "fetch_rollouts", "sample"]

# Responses asked for at once: enough to fill every engine, few enough to see progress.
CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Answer:
    """A response as a person would read it."""

    prompt_id: int
    text: str
    finished: bool


async def sample(
    pool: EnginePool,
    requests: Sequence[SampleRequest],
    on_progress: Callable[[int, int], None],
    temperature: float | None = None,
) -> list[RolloutBatch]:
    """A response for each request, batch by batch; `on_progress` hears how many of them there are so far."""
    batches = []
    for start in range(0, len(requests), CHUNK):
        batches += [batch async for batch in pool.generate(requests[start : start + CHUNK], temperature)]
        on_progress(min(start + CHUNK, len(requests)), len(requests))
    return batches


async def fetch_rollouts(batches: Sequence[RolloutBatch], timeout_s: float) -> dict[int, Rollout]:
    """The rollouts themselves, by sample_id; raises as `fetched` does when they cannot be had."""
    handles = [handle for batch in batches for handle in batch.handles]
    chunks: list[list[Rollout]] = [await fetched(handle, "responses", timeout_s) for handle in handles]
    return {rollout.info.sample_id: rollout for chunk in chunks for rollout in chunk}


def answers(tokenizer: PreTrainedTokenizerBase, rollouts: Mapping[int, Rollout]) -> dict[int, Answer]:
    """Each rollout's response as text, without special tokens, by sample_id."""
    return {
        sample_id: Answer(
            rollout.info.prompt_id,
            tokenizer.decode(rollout.tokens[rollout.prompt_tokens :], skip_special_tokens=True).strip(),
            not rollout.info.truncated,
        )
        for sample_id, rollout in rollouts.items()
    }
