"""What the loop needs of the rest of the system. Ray, vLLM and DeepSpeed live behind these; tests pass plain fakes.

A `Handle` is an opaque reference to data that stays where it was made. The driver passes handles on and never looks
inside: it works with ids and scalars only.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rayrlhf.types import RolloutInfo, SampleRequest, StepReport
from rayrlhf.weights.publish import Publication

__all__ = [
    "Checkpoints",
    "ExperienceBatch",
    "Handle",
    "Learners",
    "Ledger",
    "MetricSink",
    "Quarantined",
    "RolloutBatch",
    "RolloutPool",
    "ScoredBatch",
    "ScoredPart",
    "Scorers",
    "Weights",
]

Handle = Any


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The responses of one step: who they are, and where."""

    infos: tuple[RolloutInfo, ...]
    handles: tuple[Handle, ...]
    seconds: float = 0.0
    """from the first request to the last response"""

    @classmethod
    def joined(cls, parts: Sequence[RolloutBatch], seconds: float = 0.0) -> RolloutBatch:
        infos = tuple(info for part in parts for info in part.infos)
        return cls(infos, tuple(handle for part in parts for handle in part.handles), seconds)


@dataclass(frozen=True, slots=True)
class ScoredPart:
    """What the frozen models say of some responses."""

    handles: tuple[Handle, ...]
    failed: Mapping[int, str] = field(default_factory=dict)
    """sample_id -> why it could not be scored: nobody may learn from it"""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A response that is not learned from; another was drawn in its place."""

    sample_id: int
    prompt_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    rollouts: RolloutBatch
    """those to learn from; quarantined ones may still lie in its handles"""
    scores: tuple[Handle, ...]
    version: int
    """of the policy that learns from it"""
    quarantined: tuple[Quarantined, ...] = ()


@dataclass(frozen=True, slots=True)
class ExperienceBatch:
    infos: tuple[RolloutInfo, ...]
    handles: tuple[Handle, ...]
    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]]
    """a few responses as text with their scores, for samples.jsonl"""


class RolloutPool(Protocol):
    def generate(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[RolloutBatch]:
        """The responses, some at a time as they are finished. A publish waits for the last of them."""
        ...


class Scorers(Protocol):
    async def frozen(self, batch: RolloutBatch) -> ScoredPart:
        """Reference log-probs and rewards: the same whenever they are asked for. A sample may fail to be scored."""
        ...

    async def learning(self, batch: RolloutBatch) -> tuple[Handle, ...]:
        """Old log-probs and values: of the models as they are now."""
        ...


class Learners(Protocol):
    async def estimate(self, batch: ScoredBatch, kl_coef: float) -> ExperienceBatch: ...
    async def update(self, experience: ExperienceBatch, step: int) -> StepReport: ...


class Weights(Protocol):
    async def publish(self, version: int) -> Publication: ...


class Checkpoints(Protocol):
    async def save(self, step: int, kl_coef: float, metrics: Mapping[str, float], due: bool = False) -> bool:
        """If it is due, or said to be; whether a checkpoint was written. `kl_coef`: of the next step."""
        ...


class Ledger(Protocol):
    """What became of each sample; on the disk when a call returns."""

    def step(self, step: int, batch: ScoredBatch) -> None:
        """It learned from the batch, and its weights are published."""
        ...

    def checkpoint(self, step: int) -> None:
        """All up to this step can be gone on from."""
        ...


class MetricSink(Protocol):
    def write(self, record: Mapping[str, Any]) -> None: ...
    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None: ...
