"""PPO, one step after another: the page to read first.

              prompts ──► rollout (vLLM)          "generate"   samples with versioned weights
                             │ handles
        policy, reference, reward, value          "score"      old and reference log-probs, rewards, values
                             │ handles
                          learners                "estimate"   token rewards, GAE, whitening
                             │
                          learners                "update"     policy and value, minibatch by minibatch
                             │
              policy ────► rollout (vLLM)         "publish"    the next version, verified
                             │
                          disk                    "save"       when due

The driver holds handles, ids and scalars; tokens go from actor to actor.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from rayrlhf.algorithms.kl import AdaptiveKL, FixedKL
from rayrlhf.driver.protocols import (
    Checkpoints,
    ExperienceBatch,
    Learners,
    MetricSink,
    RolloutPool,
    ScoredBatch,
    Scorers,
    Weights,
)
from rayrlhf.metrics.clock import StepClock
from rayrlhf.weights.publish import Publication

__all__ = ["PUBLISH_PARTS", "Pacing", "Parts", "run_ppo"]

PUBLISH_PARTS = ("gather", "transfer", "fingerprint", "load", "probe")


class Pacing(Protocol):
    def scored_batches(self, rollout: RolloutPool, scorers: Scorers) -> AsyncIterator[ScoredBatch]: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything the loop drives."""

    rollout: RolloutPool
    scorers: Scorers
    learners: Learners
    weights: Weights
    checkpoints: Checkpoints
    sink: MetricSink
    clock: StepClock
    gauges: Callable[[], Awaitable[dict[str, float]]]
    """read once a step, outside every phase: memory per role"""


async def run_ppo(parts: Parts, pacing: Pacing, kl: FixedKL | AdaptiveKL) -> int:
    """Run until the pacing ends; returns the last published version (the number of steps)."""
    clock, step = parts.clock, 0
    await parts.weights.publish(version=0)  # the engines prove that they hold the policy before they sample
    clock.start_step()
    async for batch in pacing.scored_batches(parts.rollout, parts.scorers):
        with clock.phase("estimate"):
            experience = await parts.learners.estimate(batch, kl.coef)
        with clock.phase("update"):
            report = await parts.learners.update(experience, step)
        with clock.phase("publish"):
            published = await parts.weights.publish(version=step + 1)
        with clock.phase("save"):
            await parts.checkpoints.save_if_due(step + 1)
        step += 1
        record = {"step": step, **report.metrics, "kl/coef": kl.coef, **_publish_metrics(published)}
        kl.update(report.kl, report.num_samples)
        parts.sink.write_samples(step, experience.samples)
        record |= await parts.gauges()
        parts.sink.write(record | clock.end_step(_tokens(experience)))
        clock.start_step()
    return step


def _publish_metrics(published: Publication) -> dict[str, Any]:
    return {
        "weights/version": published.version,
        "weights/publish_s": published.seconds,
        **{f"weights/{part}_s": getattr(published, f"{part}_s") for part in PUBLISH_PARTS},
        "weights/gib_per_s": published.nbytes / 2**30 / (published.gather_s + published.transfer_s),
        "weights/quarantined": len(published.quarantined),
        "weights/quarantine_reasons": published.quarantined,
    }


def _tokens(experience: ExperienceBatch) -> dict[str, int]:
    """What a step generated, and what it trained on."""
    return {
        "rollout": sum(info.response_tokens for info in experience.infos),
        "train": sum(info.tokens for info in experience.infos),
    }
