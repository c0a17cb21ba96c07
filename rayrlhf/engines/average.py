"""An exponential moving average of a learner's weights, apart from the weights that learn and sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, in float32; starts as the weights are.

    Each rank averages what it holds: its shards under ZeRO-3, else everything, on rank 0 alone.
    Source: Ouyang et al. 2022, appendix C.4 (decay 0.992).
    """

    def __init__(self, module: nn.Module, decay: float, rank: int) -> None:
        self._decay = decay
        self._parameters: list[Any] = [p for p in module.parameters() if rank == 0 or hasattr(p, "ds_tensor")]
        self.tensors = [tensor.detach().float().clone() for tensor in self._held()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        for average, weights in zip(self.tensors, self._held(), strict=True):
            average.lerp_(weights.float(), 1.0 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The learner's weights are the average meanwhile: for saving it."""
        kept = [weights.clone() for weights in self._held()]
        self._fill(self.tensors)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, weights, value in zip(self._parameters, self._held(), values, strict=True):
            weights.copy_(value)
            parameter.ds_secondary_tensor = None  # hpZ's copy

    def _held(self) -> list[Tensor]:
        """What this rank stores of each parameter; asked for anew, since DeepSpeed may move it."""
        return [getattr(p, "ds_tensor", p.data) for p in self._parameters]
