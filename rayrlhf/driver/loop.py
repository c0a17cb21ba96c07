"""PPO, one step after another: the page to read first.

              prompts ──► rollout (vLLM)          "generate"   samples with versioned weights (see pacing.py)
                             │ handles
        policy, reference, reward, value          "score"      old and reference log-probs, rewards, values
                             │ handles
                          learners                "estimate"   token rewards, GAE, whitening
                             │
                          learners                "update"     policy and value, minibatch by minibatch
                             │
              policy ────► rollout (vLLM)         "publish"    the next version, verified
                             │
                          ledger                               what became of each sample
                             │
                          disk                    "save"       when due, once the step's record is written

The driver holds handles, ids and scalars; tokens go from actor to actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from rayrlhf.algorithms.kl import AdaptiveKL, FixedKL
from rayrlhf.driver.protocols import (
    Checkpoints,
    Learners,
    Ledger,
    MetricSink,
    RolloutPool,
    ScoredBatch,
    Scorers,
    Weights,
)
from rayrlhf.errors import ActorError, ActorLost, DataLost, RayRLHFError, Stopped, TrainingError, WeightSyncError
from rayrlhf.metrics.clock import StepClock
from rayrlhf.metrics.throughput import throughput
from rayrlhf.weights.publish import PUBLISH_PARTS, Publication

__all__ = ["Pacing", "Parts", "run_ppo"]


class Pacing(Protocol):
    max_staleness: int
    """versions that a sample may be older than the policy that learns from it"""

    def scored_batches(self, rollout: RolloutPool, scorers: Scorers) -> AsyncGenerator[ScoredBatch]: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything the loop drives."""

    rollout: RolloutPool
    scorers: Scorers
    learners: Learners
    weights: Weights
    checkpoints: Checkpoints
    ledger: Ledger
    sink: MetricSink
    clock: StepClock
    gauges: Callable[[], Awaitable[dict[str, float]]]
    """read once a step, outside every phase: memory per role"""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """somebody wants the run to end"""


async def run_ppo(parts: Parts, pacing: Pacing, kl: FixedKL | AdaptiveKL, step: int = 0) -> int:
    """Run until the pacing ends; returns the last published version (the number of steps).

    Args:
        step: how many are done already; the pacing starts there too.

    Raises:
        Stopped: `parts.stop` was set; responses under way are dropped, a step that learns is ended, then all is saved.
        ActorLost, DataLost: what learns, or what it was to learn from, is gone; go on from a checkpoint.
        ActorError, TrainingError, WeightSyncError: no more batches can be had, or no engine takes the weights; what has
            been learned is saved.
    """
    clock, metrics = parts.clock, dict[str, float]()
    await parts.weights.publish(version=step)  # the engines prove that they hold the policy before they sample
    clock.start_step()
    async with aclosing(pacing.scored_batches(parts.rollout, parts.scorers)) as batches:
        while batch := await _next(parts, batches, (step, kl.coef, metrics)):
            staleness = _staleness(batch, pacing.max_staleness)
            with clock.phase("estimate"):
                experience = await parts.learners.estimate(batch, kl.coef)
            with clock.phase("update"):
                report = await parts.learners.update(experience, step)
            with clock.phase("publish"):
                published, failed = await _publish(parts, step + 1)
            step += 1
            parts.ledger.step(step, batch)
            record = {"step": step, **report.metrics, **staleness, "kl/coef": kl.coef, **_publish_metrics(published)}
            kl.update(report.kl, report.num_samples)
            parts.sink.write_samples(step, experience.samples)
            record |= {"rollout/quarantined": len(batch.quarantined), **await parts.gauges()}
            times = clock.end_step()
            parts.sink.write(record | times | throughput(batch.rollouts.infos, batch.rollouts.seconds, times))
            clock.start_step()
            metrics = report.metrics
            if failed:
                await _save_at_last(parts, step, kl.coef, metrics)
                raise failed
            with clock.phase("save"):  # the next step's time: a checkpoint covers the record of its own
                await _save(parts, step, kl.coef, metrics)
    if parts.stop.is_set():
        await _save(parts, step, kl.coef, metrics, due=True)
        done = f"after step {step}, which is saved" if step else "before the first step"
        raise Stopped(f"stopped {done}", "go on with --resume")
    return step


async def _publish(parts: Parts, version: int) -> tuple[Publication, RayRLHFError | None]:
    """What was published, and what ends the run once the step is saved: its learning was sound."""
    try:
        return await parts.weights.publish(version), None
    except (ActorLost, DataLost):
        raise
    except (ActorError, WeightSyncError) as failed:
        return Publication(version), failed


async def _next(
    parts: Parts, batches: AsyncGenerator[ScoredBatch], learned: tuple[int, float, dict[str, float]]
) -> ScoredBatch | None:
    """The next batch; None after the last one, or as soon as the run is to stop.

    When it cannot be had, and nobody is to be replaced, what has been learned is saved before the error goes on.
    """
    try:
        return await _unless(parts.stop, batches)
    except (ActorLost, DataLost):
        raise
    except (ActorError, TrainingError, WeightSyncError):
        await _save_at_last(parts, *learned)
        raise


async def _unless(stop: asyncio.Event, batches: AsyncGenerator[ScoredBatch]) -> ScoredBatch | None:
    coming, stopping = asyncio.ensure_future(anext(batches, None)), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([coming, stopping], return_when=asyncio.FIRST_COMPLETED)
        return None if stop.is_set() else await coming
    finally:
        for waiting in (coming, stopping):
            waiting.cancel()
        await asyncio.gather(coming, stopping, return_exceptions=True)


async def _save(parts: Parts, step: int, kl_coef: float, metrics: dict[str, float], due: bool = False) -> None:
    if await parts.checkpoints.save(step, kl_coef, metrics, due):
        parts.ledger.checkpoint(step)


async def _save_at_last(parts: Parts, step: int, kl_coef: float, metrics: dict[str, float]) -> None:
    """What has been learned, before an error that ends the run; that one is told, whatever becomes of this."""
    with suppress(RayRLHFError):
        await _save(parts, step, kl_coef, metrics, due=True)


def _publish_metrics(published: Publication) -> dict[str, Any]:
    return {
        "weights/version": published.version,
        "memory/rollout_gib": published.memory_gib,
        "weights/publish_s": published.seconds,
        **{f"weights/{part}_s": getattr(published, f"{part}_s") for part in PUBLISH_PARTS},
        "weights/gib_per_s": published.nbytes / 2**30 / ((published.gather_s + published.transfer_s) or 1.0),
        "weights/quarantined": len(published.quarantined),
        "weights/quarantine_reasons": published.quarantined,
    }


def _staleness(batch: ScoredBatch, limit: int) -> dict[str, float]:
    """Versions between the policy that sampled a response and the one that learns from it.

    Raises:
        TrainingError: when a sample is older than the pacing allows.
    """
    ages = [batch.version - info.version for info in batch.rollouts.infos]
    if max(ages) > limit:
        raise TrainingError(
            f"a sample is {max(ages)} versions old, {limit} are allowed",
            "this is a mistake of the pacing, not of the config: please report it",
        )
    return {"rollout/staleness_mean": sum(ages) / len(ages), "rollout/staleness_max": float(max(ages))}
