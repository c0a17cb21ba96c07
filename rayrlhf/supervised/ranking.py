"""Ranking: what the reward model learns; and scores of whole sequences by any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayrlhf.algorithms import ranking_loss
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import RankingExample
from rayrlhf.engines.batches import Layout, last_tokens, lay_out, to_device
from rayrlhf.engines.deepspeed import FrozenModel, Learner
from rayrlhf.engines.distributed import all_reduce_sum

__all__ = ["RankingTask", "infer_sequences", "score_sequences"]

Module = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class _RankingBatch:
    layout: Layout
    last_positions: Tensor
    """int64 [N]: of each response"""
    ranks: Tensor
    """int64 [N]"""
    prompts: Tensor
    """int64 [N]: which prompt a response belongs to"""


class RankingTask:
    """K-wise ranking: one pass per response, all pairs of a prompt in one micro-batch (Ouyang et al. 2022, eq. 1)."""

    def __init__(self, examples: Sequence[RankingExample]) -> None:
        self.examples = examples
        self.sizes = [sum(len(r) for r in e.responses) for e in examples]

    def cut(self, rows: Sequence[int], cutting: Cutting, device: torch.device) -> list[_RankingBatch]:
        examples = [self.examples[i] for i in rows]
        layouts = lay_out([e.responses for e in examples], cutting, device)
        return [_ranking_batch([examples[i] for i in layout.units], layout) for layout in layouts]

    def dummy(self, device: torch.device) -> _RankingBatch:
        smallest = int(np.argmin(self.sizes))
        return self.cut([smallest], Cutting(self.sizes[smallest]), device)[0]

    def denominator(self, rows: Sequence[int]) -> float:
        """Prompts that have at least one pair that is not a tie."""
        return float(sum(len(set(self.examples[i].ranks)) > 1 for i in rows))

    def loss(self, module: Module, micro_batch: _RankingBatch, denominator: float) -> Tensor:
        scores = module(**micro_batch.layout.inputs, positions=micro_batch.last_positions)
        return ranking_loss(scores, micro_batch.ranks, micro_batch.prompts, denominator)

    def take_metrics(self) -> dict[str, float]:
        return {}

    def scores(self, learner: Learner, cutting: Cutting) -> list[list[float]]:
        """The score of every response, by example; all ranks get all of them."""
        flat = [response for e in self.examples for response in e.responses]
        scored = iter(score_sequences(learner, flat, cutting))
        return [[next(scored) for _ in e.responses] for e in self.examples]


def _ranking_batch(examples: Sequence[RankingExample], layout: Layout) -> _RankingBatch:
    device = layout.tokens.device
    ranks = to_device(torch.tensor([rank for e in examples for rank in e.ranks]), device)
    prompts = to_device(torch.tensor([i for i, e in enumerate(examples) for _ in e.responses]), device)
    return _RankingBatch(layout, _last(layout, [r for e in examples for r in e.responses]), ranks, prompts)


def score_sequences(learner: Learner | FrozenModel, sequences: Sequence[np.ndarray], cutting: Cutting) -> list[float]:
    """A scalar model's output at the last token of each sequence; shared out over the ranks, returned on all."""

    def forward(module: Module, layout: Layout, held: Sequence[int]) -> Tensor:
        return module(**layout.inputs, positions=_last(layout, [sequences[i] for i in held]))

    return infer_sequences(learner, sequences, forward, cutting)


def infer_sequences(
    learner: Learner | FrozenModel,
    sequences: Sequence[np.ndarray],
    forward: Callable[[Module, Layout, Sequence[int]], Tensor],
    cutting: Cutting,
) -> list[float]:
    """One number for each sequence, without gradients; shared out over the ranks, returned on all.

    Args:
        forward: of the module, a layout and which of `sequences` [S] it holds, in order: their numbers [S].
    """
    rows = range(learner.rank, len(sequences), learner.world_size)
    layouts = lay_out([[sequences[i]] for i in rows], cutting, learner.device)
    batches = [(layout, [rows[i] for i in layout.units]) for layout in layouts]
    shortest = min(range(len(sequences)), key=lambda i: len(sequences[i]))
    alone = lay_out([[sequences[shortest]]], Cutting(len(sequences[shortest])), learner.device)[0]
    results = learner.infer(lambda module, batch: forward(module, *batch).double(), batches, (alone, [shortest]))
    numbers = torch.zeros(len(sequences), dtype=torch.float64, device=learner.device)
    for (_, held), result in zip(batches, results, strict=True):
        numbers[held] = result
    return [float(x) for x in all_reduce_sum(numbers).tolist()]


def _last(layout: Layout, sequences: Sequence[np.ndarray]) -> Tensor:
    """int64 [S]: flat index of each sequence's last token."""
    return last_tokens(layout, [len(s) for s in sequences])
