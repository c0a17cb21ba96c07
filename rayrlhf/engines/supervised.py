"""Supervised training on one rank: the loop, and the two tasks it serves (language modelling, ranking). No Ray.

The loop knows no loss: a task says how its examples become micro-batches, what a minibatch is divided by, and what
the loss of a micro-batch is. pretrain and sft share `LanguageTask`; reward is `RankingTask`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from rayrlhf.algorithms import lm_loss, ranking_loss
from rayrlhf.data.batching import balance, epoch_order, micro_batches, pad_rows
from rayrlhf.data.prompts import LMExample, RankingExample
from rayrlhf.engines.deepspeed import Learner
from rayrlhf.engines.distributed import all_reduce_sum
from rayrlhf.engines.schedule import cosine_with_warmup

__all__ = ["LanguageTask", "RankingTask", "Task", "TrainSettings", "train"]

M = TypeVar("M")
Module = Callable[..., Tensor]
Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    learning_rate: float
    batch_size: int
    epochs: float
    warmup_ratio: float
    final_lr_ratio: float
    micro_batch_tokens: int
    log_every: int
    seed: int
    max_steps: int | None = None

    def steps(self, examples: int) -> int:
        """Optimizer steps; each epoch drops its last, short batch unless there is no other."""
        per_epoch = max(1, examples // self.batch_size)
        total = max(1, round(per_epoch * self.epochs))
        return min(total, self.max_steps) if self.max_steps else total


class Task(Protocol[M]):
    @property
    def sizes(self) -> Sequence[int]:
        """Tokens of each example."""
        ...

    def cut(self, rows: Sequence[int], budget: int, device: torch.device) -> list[M]:
        """The examples `rows` as micro-batches of at most `budget` padded tokens."""
        ...

    def dummy(self, device: torch.device) -> M:
        """A micro-batch for ranks that have run out of their own; it counts zero."""
        ...

    def denominator(self, rows: Sequence[int]) -> float:
        """What `rows` add to the number that the minibatch's loss is divided by."""
        ...

    def loss(self, module: Module, micro_batch: M, denominator: float) -> Tensor: ...


def train(learner: Learner, task: Task[M], settings: TrainSettings, log: Log) -> dict[str, float]:
    """Run all steps; `log` gets a record every `log_every` steps. Returns the last record's numbers."""
    total = settings.steps(len(task.sizes))
    warmup = round(settings.warmup_ratio * total)
    dummy, record = task.dummy(learner.device), dict[str, float]()
    start, tokens = perf_counter(), 0
    for step, batch in zip(range(total), _batches(len(task.sizes), settings), strict=False):
        rate = cosine_with_warmup(step, total, settings.learning_rate, warmup, settings.final_lr_ratio)
        shares = balance([task.sizes[i] for i in batch], learner.world_size)
        mine = [batch[i] for i in shares[learner.rank]]
        denominator = task.denominator(batch)
        result = learner.train_step(
            lambda module, m, d=denominator: task.loss(module, m, d),
            task.cut(mine, settings.micro_batch_tokens, learner.device),
            dummy,
            rate,
        )
        tokens += sum(task.sizes[i] for i in batch)
        if (step + 1) % settings.log_every == 0 or step + 1 == total:
            loss = all_reduce_sum(torch.tensor(result["loss"], dtype=torch.float64, device=learner.device))
            elapsed = perf_counter() - start
            record = {
                "loss": float(loss),
                "grad_norm": result["grad_norm"],
                "learning_rate": rate,
                "tokens_per_s": tokens / elapsed,
            }
            log({"step": step + 1, "steps": total, "elapsed_s": elapsed, **record})
    return record


def _batches(examples: int, settings: TrainSettings) -> Iterator[list[int]]:
    """Endless minibatches in a fresh shuffle each epoch, the same on every rank."""
    size, epoch = min(settings.batch_size, examples), 0
    while True:
        order = epoch_order(examples, settings.seed, epoch)
        for start in range(0, examples - size + 1, size):
            yield [int(i) for i in order[start : start + size]]
        epoch += 1


@dataclass(frozen=True, slots=True)
class _LanguageBatch:
    tokens: Tensor
    """int64 [B, T]"""
    positions: Tensor
    """int64 [N]: the tokens learned, never a row's first"""


class LanguageTask:
    """Next-token loss on what follows the prompt; on everything but the first token where there is no prompt."""

    def __init__(self, examples: Sequence[LMExample]) -> None:
        self.examples = examples
        self.sizes = [len(e.tokens) for e in examples]

    def cut(self, rows: Sequence[int], budget: int, device: torch.device) -> list[_LanguageBatch]:
        cuts = micro_batches([self.sizes[i] for i in rows], budget)
        return [self._collate([self.examples[rows[i]] for i in cut], device) for cut in cuts]

    def dummy(self, device: torch.device) -> _LanguageBatch:
        return self._collate([min(self.examples, key=lambda e: len(e.tokens))], device)

    def denominator(self, rows: Sequence[int]) -> float:
        return float(sum(self.sizes[i] - _first_learned(self.examples[i]) for i in rows))

    def loss(self, module: Module, micro_batch: _LanguageBatch, denominator: float) -> Tensor:
        logprobs = module(tokens=micro_batch.tokens, positions=micro_batch.positions)
        return lm_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), denominator)

    def evaluate(self, learner: Learner, budget: int) -> float:
        """Mean loss per learned token over all examples, shared out over the ranks."""
        rows = range(learner.rank, len(self.examples), learner.world_size)
        cuts = self.cut(rows, budget, learner.device)
        sums = learner.infer(
            lambda module, m: float(module(tokens=m.tokens, positions=m.positions).double().sum()),
            cuts,
            self.dummy(learner.device),
        )
        total = torch.tensor([-sum(sums), self.denominator(rows)], dtype=torch.float64, device=learner.device)
        loss, count = (float(x) for x in all_reduce_sum(total))
        return loss / count

    def _collate(self, examples: Sequence[LMExample], device: torch.device) -> _LanguageBatch:
        tokens = torch.from_numpy(pad_rows([e.tokens for e in examples], 0, np.int64))
        width = tokens.shape[1]
        positions = [
            torch.arange(row * width + _first_learned(e), row * width + len(e.tokens)) for row, e in enumerate(examples)
        ]
        return _LanguageBatch(tokens.to(device), torch.cat(positions).to(device))


def _first_learned(example: LMExample) -> int:
    return max(1, example.prompt_tokens)


@dataclass(frozen=True, slots=True)
class _RankingBatch:
    tokens: Tensor
    """int64 [N, T]: all responses of some prompts"""
    last_positions: Tensor
    """int64 [N]"""
    ranks: Tensor
    """int64 [N]"""
    prompts: Tensor
    """int64 [N]: which prompt a response belongs to"""


class RankingTask:
    """K-wise ranking: one pass per response, all pairs of a prompt in one micro-batch (Ouyang et al. 2022, eq. 1)."""

    def __init__(self, examples: Sequence[RankingExample]) -> None:
        self.examples = examples
        self.sizes = [sum(len(r) for r in e.responses) for e in examples]
        self._padded = [len(e.responses) * max(len(r) for r in e.responses) for e in examples]

    def cut(self, rows: Sequence[int], budget: int, device: torch.device) -> list[_RankingBatch]:
        cuts: list[list[int]] = []
        # Like micro_batches, but a prompt's responses stay together.
        widths = {i: max(len(r) for r in self.examples[i].responses) for i in rows}
        count = 0
        for i in sorted(rows, key=lambda i: (widths[i], i)):
            responses = len(self.examples[i].responses)
            if not cuts or (count + responses) * widths[i] > budget:
                cuts.append([])
                count = 0
            cuts[-1].append(i)
            count += responses
        return [self._collate([self.examples[i] for i in cut], device) for cut in cuts]

    def dummy(self, device: torch.device) -> _RankingBatch:
        return self._collate([self.examples[int(np.argmin(self._padded))]], device)

    def denominator(self, rows: Sequence[int]) -> float:
        """Prompts that have at least one pair that is not a tie."""
        return float(sum(len(set(self.examples[i].ranks)) > 1 for i in rows))

    def loss(self, module: Module, micro_batch: _RankingBatch, denominator: float) -> Tensor:
        scores = module(tokens=micro_batch.tokens, positions=micro_batch.last_positions)
        return ranking_loss(scores, micro_batch.ranks, micro_batch.prompts, denominator)

    def scores(self, learner: Learner, budget: int) -> list[list[float]]:
        """The score of every response, by example; all ranks get all of them."""
        flat = [response for e in self.examples for response in e.responses]
        scored = iter(score_sequences(learner, flat, budget))
        return [[next(scored) for _ in e.responses] for e in self.examples]

    def _collate(self, examples: Sequence[RankingExample], device: torch.device) -> _RankingBatch:
        responses = [response for e in examples for response in e.responses]
        tokens, last = _last_positions(responses, device)
        ranks = torch.tensor([rank for e in examples for rank in e.ranks], device=device)
        prompts = torch.tensor([i for i, e in enumerate(examples) for _ in e.responses], device=device)
        return _RankingBatch(tokens, last, ranks, prompts)


def score_sequences(learner: Learner, sequences: Sequence[np.ndarray], budget: int) -> list[float]:
    """A scalar model's output at the last token of each sequence; shared out over the ranks, returned on all."""
    rows = list(range(learner.rank, len(sequences), learner.world_size))
    cuts = [[rows[i] for i in cut] for cut in micro_batches([len(sequences[i]) for i in rows], budget)]
    batches = [_last_positions([sequences[i] for i in cut], learner.device) for cut in cuts]
    dummy = _last_positions([min(sequences, key=len)], learner.device)
    results = learner.infer(lambda module, m: module(tokens=m[0], positions=m[1]).double(), batches, dummy)
    scores = torch.zeros(len(sequences), dtype=torch.float64, device=learner.device)
    for cut, result in zip(cuts, results, strict=True):
        scores[torch.tensor(cut)] = result
    return [float(x) for x in all_reduce_sum(scores).tolist()]


def _last_positions(sequences: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Padded tokens [B, T] and the flat index [B] of each row's last token."""
    tokens = torch.from_numpy(pad_rows(sequences, 0, np.int64))
    last = torch.tensor([row * tokens.shape[1] + len(s) - 1 for row, s in enumerate(sequences)])
    return tokens.to(device), last.to(device)
