"""A rollout engine as an actor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import psutil

from rayrlhf.actors.base import Actor, leaves_data, use_rays_network
from rayrlhf.actors.relay import Arrivals
from rayrlhf.engines.vllm import EngineSettings, RolloutEngine
from rayrlhf.models.residence import Part
from rayrlhf.types import PromptTokens, Rollout, RolloutInfo, SampleRequest
from rayrlhf.weights.probe import ProbeRow
from rayrlhf.weights.publish import EngineReceipt
from rayrlhf.weights.transports import Meeting

__all__ = ["RolloutActor"]


class RolloutActor(Actor):
    def __init__(self, log: str, settings: EngineSettings) -> None:
        super().__init__(log)
        self._settings = settings

    def start(self, prompts: list[PromptTokens]) -> None:
        use_rays_network()
        self._arrivals = Arrivals(self._settings.transport, self._settings.run)
        self._engine = RolloutEngine(self._settings, prompts)

    def occupy(self, part: Part) -> None:
        """As of the models; an engine is there as a whole or not at all."""
        if hasattr(self, "_engine"):
            self._engine.occupy(part)

    def hold_prompts(self, prompts: list[PromptTokens]) -> None:
        """Others in place of those that it started with."""
        self._engine.hold_prompts(prompts)

    def memory_gib(self) -> float:
        """Also that of the shards' processes, where the engine has several."""
        shards = psutil.Process().children() if self._settings.tensor_parallel > 1 else []
        return super().memory_gib() + float(sum(p.memory_info().rss for p in shards)) / 2**30

    @leaves_data
    def generate(
        self, version: int, requests: Sequence[SampleRequest], at_once: int, temperature: float | None = None
    ) -> tuple[list[RolloutInfo], list[Rollout]]:
        """Begin to sample, and hand over the first part: see `next_part`.

        Args:
            version: that the driver has verified; naming it commits it.
        """
        self._engine.commit(version)
        self._parts: Iterator[list[Rollout]] = self._engine.generate(requests, at_once, temperature)
        return self.next_part()

    @leaves_data
    def next_part(self) -> tuple[list[RolloutInfo], list[Rollout]]:
        """The next responses that are finished: who was sampled, then the responses themselves."""
        rollouts = next(self._parts)
        return [r.info for r in rollouts], rollouts

    def close(self) -> None:
        self._arrivals.close()
        self._engine.close()

    def meet(self, meeting: Meeting) -> None:
        self._engine.meet(meeting)

    def load_bucket(self, ticket: dict[str, Any]) -> None:
        """The first one of a version begins the update."""
        if ticket["header"]["index"] == 0:
            self._parts = iter(())  # of a batch that nobody took to its end: the engine drops the rest
            self._engine.begin_update(ticket["header"]["version"])
        self._engine.load_bucket(self._arrivals.localise(ticket))

    def verify(self, ticket: dict[str, Any], rows: Sequence[ProbeRow]) -> EngineReceipt:
        """Load the last bucket, and say what came."""
        self.load_bucket(ticket)
        return replace(self._engine.verify(rows), memory_gib=self.memory_gib())
