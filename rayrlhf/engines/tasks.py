"""Language modelling: what pretrain and sft learn, and PPO-ptx's text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayrlhf.algorithms import lm_loss
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample
from rayrlhf.engines.batches import Layout, lay_out, spans
from rayrlhf.engines.deepspeed import Learner
from rayrlhf.engines.distributed import all_reduce_sum

__all__ = ["LanguageBatch", "LanguageTask", "language_batches"]

Module = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class LanguageBatch:
    layout: Layout
    positions: Tensor
    """int64 [N]: the tokens learned, never a sequence's first"""


class LanguageTask:
    """Next-token loss on what follows the prompt; on everything but the first token where there is no prompt."""

    def __init__(self, examples: Sequence[LMExample]) -> None:
        self.examples = examples
        self.sizes = [len(e.tokens) for e in examples]

    def cut(self, rows: Sequence[int], cutting: Cutting, device: torch.device) -> list[LanguageBatch]:
        return language_batches([self.examples[i] for i in rows], cutting, device)

    def dummy(self, device: torch.device) -> LanguageBatch:
        shortest = min(self.examples, key=lambda e: len(e.tokens))
        return language_batches([shortest], Cutting(len(shortest.tokens)), device)[0]

    def denominator(self, rows: Sequence[int]) -> float:
        return float(sum(self.sizes[i] - _first_learned(self.examples[i]) for i in rows))

    @staticmethod
    def loss(module: Module, micro_batch: LanguageBatch, denominator: float) -> Tensor:
        logprobs = module(**micro_batch.layout.inputs, positions=micro_batch.positions)
        return lm_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), denominator)

    def take_metrics(self) -> dict[str, float]:
        return {}

    def evaluate(self, learner: Learner, cutting: Cutting) -> float:
        """Mean loss per learned token over all examples, shared out over the ranks."""
        rows = range(learner.rank, len(self.examples), learner.world_size)
        sums = learner.infer(
            lambda module, m: float(module(**m.layout.inputs, positions=m.positions).double().sum()),
            self.cut(rows, cutting, learner.device),
            self.dummy(learner.device),
        )
        total = torch.tensor([-sum(sums), self.denominator(rows)], dtype=torch.float64, device=learner.device)
        loss, count = (float(x) for x in all_reduce_sum(total))
        return loss / count


def language_batches(examples: Sequence[LMExample], cutting: Cutting, device: torch.device) -> list[LanguageBatch]:
    """Micro-batches of `examples`, none for none."""
    batches = []
    for layout in lay_out([[e.tokens] for e in examples], cutting, device):
        mine = [examples[i] for i in layout.units]
        positions = spans(layout, [_first_learned(e) for e in mine], [len(e.tokens) for e in mine])
        batches.append(LanguageBatch(layout, positions))
    return batches


def _first_learned(example: LMExample) -> int:
    return max(1, example.prompt_tokens)
