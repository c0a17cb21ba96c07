"""Responses of given lengths, for the benchmarks that sample: random models end theirs anywhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray import cloudpickle

from rayrlhf.actors.rollout import RolloutActor
from rayrlhf.engines.vllm import RolloutEngine
from rayrlhf.types import PromptTokens, SampleRequest

__all__ = ["NICE", "GivenLengths", "actor_with_lengths", "given_lengths"]

# Ray runs its workers with this niceness; the plain processes beside them get it too.
NICE = 15


class GivenLengths(RolloutEngine):
    """An engine whose i-th response, and every so manieth after it, has the i-th of some lengths."""

    lengths: Sequence[int] = ()

    def _sampling(self, request: SampleRequest, temperature: float | None) -> Any:
        params = super()._sampling(request, temperature)
        params.max_tokens = self.lengths[request.sample_id % len(self.lengths)]
        params.ignore_eos, params.stop_token_ids = True, []  # nothing may end a response early
        return params


def actor_with_lengths(lengths: Sequence[int]) -> type[RolloutActor]:
    """The product's actor around such an engine."""

    class Rollout(RolloutActor):
        def start(self, prompts: list[PromptTokens]) -> None:
            super().start(prompts)
            self._engine.__class__ = GivenLengths  # which adds nothing to how an engine is made
            self._engine.lengths = lengths  # type: ignore[attr-defined]

    return Rollout


def given_lengths(kind: str, count: int, longest: int) -> list[int]:
    """Tokens of each response, `fixed` or `log-normal`: a quarter of the longest in the mean, that at most."""
    mean = longest / 4
    if kind == "fixed":
        return [int(mean)] * count
    drawn = np.clip(np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1.0, count), 1, longest)
    return [int(n) for n in np.clip(drawn * mean / drawn.mean(), 1, longest)]


# Ray's workers cannot import this module: it goes to them whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
