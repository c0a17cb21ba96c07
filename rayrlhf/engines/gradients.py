"""The gradient of a step's first part and that of its rest, told apart while they accumulate."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayrlhf.engines.distributed import all_reduce_sum

__all__ = ["GradientParts"]


class GradientParts:
    """Call `read` after each part's last backward pass, made an accumulation boundary; then ask for `norms`.

    Costs a second copy of the gradients until the step is over (under ZeRO-3 shared out over the ranks), and a
    gather of each parameter's gradient per part.
    """

    def __init__(self, module: nn.Module, rank: int, zero_stage: int) -> None:
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._rank = rank
        # After a boundary DeepSpeed's stages 1 and 2 start over, stages 0 and 3 go on accumulating.
        self._starts_over = zero_stage in (1, 2)
        self._first: list[Tensor | None] = []
        self._squares: list[list[float]] = []

    def read(self) -> None:
        """Measure what has come since the last call. A collective."""
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        squares, is_first = [], not self._first
        for i, parameter in enumerate(self._parameters):
            gradient = safe_get_full_grad(parameter)
            mine = i % dist.get_world_size() == self._rank
            if is_first:
                self._first.append(gradient.clone() if mine or self._starts_over else None)
            elif self._starts_over:
                safe_set_full_grad(parameter, gradient + self._first[i])
            elif mine:
                gradient = gradient - self._first[i]
            squares.append(float(gradient.double().square().sum()) if mine else 0.0)
        self._squares.append(squares)

    def norms(self, device: torch.device) -> dict[str, float]:
        """`first_norm` and `rest_norm`, over all parameters."""
        local = [sum(squares) for squares in self._squares]
        total = all_reduce_sum(torch.tensor(local, dtype=torch.float64, device=device)).tolist()
        return dict(zip(("first_norm", "rest_norm"), map(math.sqrt, total), strict=True))
