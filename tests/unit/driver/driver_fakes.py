"""Fakes of everything the loop drives. All write what they were asked into one log."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayrlhf.driver.loop import Parts
from rayrlhf.driver.protocols import ExperienceBatch, RolloutBatch, ScoredBatch, ScoredPart
from rayrlhf.metrics.clock import StepClock
from rayrlhf.types import RolloutInfo, SampleRequest, StepReport
from rayrlhf.weights.publish import Publication

POLICY_METRICS = {
    f"policy/{name}": 0.0 for name in ("loss", "clip_fraction", "ratio_mean", "grad_norm", "approx_kl_per_token")
}


class World:
    """One fake that plays every part; `fail` names the call that raises, at its `fail_at`-th time (from 0)."""

    def __init__(self, fail: str = "", fail_at: int = 0, keep_log: bool = True) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.records: list[dict[str, Any]] = []
        self.samples: list[tuple[int, Any]] = []
        self.asked: list[list[SampleRequest]] = []
        self.phases: list[str] = []
        self.clock = StepClock(Path(os.devnull), self.phases.append if keep_log else lambda name: None)
        self._fail, self._fail_at, self._counts = fail, fail_at, dict[str, int]()
        self._keep_log = keep_log
        self._version = 0
        self.stop = asyncio.Event()

    def _called(self, name: str, *details: Any) -> int:
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        if self._keep_log:
            self.log.append((name, *details))
        if name == self._fail and count == self._fail_at:
            raise RuntimeError(f"{name} broke")
        return count

    def parts(self) -> Parts:
        return Parts(
            rollout=self,
            scorers=self,
            learners=self,
            weights=self,
            checkpoints=self,
            ledger=_Lines(self),
            sink=self,
            clock=self.clock,
            gauges=self.gauges,
            stop=self.stop,
        )

    async def generate(self, requests: Sequence[SampleRequest]) -> AsyncIterator[RolloutBatch]:
        count = self._called("generate", len(requests))
        if self._keep_log:
            self.asked.append(list(requests))
        infos = tuple(RolloutInfo(r.sample_id, r.prompt_id, 10, 4, False, self._version) for r in requests)
        yield RolloutBatch(infos, (f"rollouts {count}",))

    async def frozen(self, batch: RolloutBatch) -> ScoredPart:
        count = self._called("frozen", *batch.handles)
        return ScoredPart((f"frozen {count}",))

    async def learning(self, batch: RolloutBatch) -> tuple[Any, ...]:
        count = self._called("learning", *batch.handles)
        return (f"learning {count}",)

    async def estimate(self, batch: ScoredBatch, kl_coef: float) -> ExperienceBatch:
        count = self._called("estimate", *batch.rollouts.handles, *batch.scores, kl_coef)
        metrics = {"reward/mean": 0.5, "kl/mean": 2.0 + count}
        return ExperienceBatch(batch.rollouts.infos, (f"experience {count}",), metrics, [{"response": "yes"}])

    async def update(self, experience: ExperienceBatch, step: int) -> StepReport:
        self._called("update", *experience.handles, step)
        metrics = {**experience.metrics, **POLICY_METRICS, "value/loss": 1.0, "value/explained_variance": 0.1}
        return StepReport(metrics, experience.metrics["kl/mean"], len(experience.infos))

    async def publish(self, version: int) -> Publication:
        self._called("publish", version)
        self._version = version
        parts = {"gather_s": 0.05, "transfer_s": 0.2, "fingerprint_s": 0.1, "load_s": 0.3, "probe_s": 0.125}
        return Publication(version, buckets=2, seconds=0.5, nbytes=2**29, memory_gib=2.5, **parts)

    async def save(self, step: int, kl_coef: float, metrics: Mapping[str, float], due: bool = False) -> bool:
        self._called("save", step, kl_coef, metrics.get("reward/mean"), due)
        return True

    def write(self, record: Mapping[str, Any]) -> None:
        self._called("write", record["step"])
        if self._keep_log:
            self.records.append(dict(record))

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        self._called("write_samples", step)
        if self._keep_log:
            self.samples.append((step, samples))

    async def gauges(self) -> dict[str, float]:
        self._called("gauges")
        return {"memory/policy_gib": 1.5}


class _Lines:
    """The ledger."""

    def __init__(self, world: World) -> None:
        self._world = world

    def step(self, step: int, batch: ScoredBatch) -> None:
        self._world._called("ledger step", step)

    def checkpoint(self, step: int) -> None:
        self._world._called("ledger checkpoint", step)


class KL:
    """A coefficient that doubles at each update."""

    def __init__(self, coef: float = 0.1) -> None:
        self.coef = coef
        self.updates: list[tuple[float, int]] = []

    def update(self, kl: float, num_samples: int) -> None:
        self.updates.append((kl, num_samples))
        self.coef *= 2
