"""What a reward source is asked, and what it answers: a number for each response, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Protocol

from rayrlhf.config.rewards import RewardSourceConfig
from rayrlhf.types import Prompt, Turns

__all__ = ["LARGEST", "Failure", "Outcome", "RewardRequest", "RewardSource", "SourceSettings", "outcome"]

# Advantages square and sum rewards in float32, where more than this leaves no digits for the others of a batch.
LARGEST = 1e9


@dataclass(frozen=True, slots=True)
class RewardRequest:
    """A response to be scored."""

    sample_id: int
    prompt: Turns
    """what was said before it"""
    response: str
    """without special tokens"""
    finished: bool
    """False for one that `rollout.max_tokens` cut"""
    source: str = ""
    """the prompt's `source` field"""


@dataclass(frozen=True, slots=True)
class Failure:
    """There is no reward for a response."""

    reason: str
    """short, and the same words for the same cause: it is counted and written to records"""


Outcome = float | Failure


class RewardSource(Protocol):
    async def score(self, requests: Sequence[RewardRequest]) -> list[Outcome]:
        """An outcome for each request, in their order; what goes wrong is a `Failure`, never an exception."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """What a rank that hosts a source (or an ensemble) needs beside the model's settings."""

    config: RewardSourceConfig
    seed: int
    """of the jitter of waits"""
    prompts: Mapping[int, Prompt] = field(default_factory=dict)
    """by prompt_id"""
    members: tuple[str, ...] = ()
    """the ensemble's models"""
    token: str | None = field(default=None, repr=False)
    """the bearer token; in no repr, log or record"""


def outcome(answer: object, where: str) -> Outcome:
    """The one place that says what counts as a reward: a finite real number within +-LARGEST, and no bool.

    Args:
        answer: whatever a source gave for one response.
        where: what to call it in a reason, such as `http: the reward`: the same for all, so that equal causes count
            as one.
    """
    if answer is None:
        return Failure(f"{where} is missing")
    if isinstance(answer, bool) or not isinstance(answer, Real):
        return Failure(f"{where} is a {type(answer).__name__}, no number")
    try:
        value = float(answer)
    except OverflowError:  # an int of hundreds of digits
        value = math.inf
    if math.isnan(value):
        return Failure(f"{where} is NaN")
    if not abs(value) <= LARGEST:
        return Failure(f"{where} is infinite" if math.isinf(value) else f"{where} is larger than {LARGEST:g}")
    return value
