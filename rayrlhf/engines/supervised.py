"""Supervised training on one rank: the loop, and the two tasks it serves (language modelling, ranking). No Ray.

The loop knows no loss: a task says how its examples become micro-batches, what a minibatch is divided by, and what
the loss of a micro-batch is. pretrain and sft share `LanguageTask`; reward is `RankingTask`; dpo has its own,
`preference.PreferenceTask`. A `Mix` adds a second task's loss to every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from rayrlhf.algorithms import lm_loss, ranking_loss
from rayrlhf.data.batching import Cutting, balance, epoch_order
from rayrlhf.data.prompts import LMExample, RankingExample
from rayrlhf.engines.batches import Layout, lay_out, spans
from rayrlhf.engines.deepspeed import FrozenModel, Learner
from rayrlhf.engines.distributed import all_reduce_sum
from rayrlhf.engines.schedule import cosine_with_warmup

__all__ = [
    "LanguageBatch",
    "LanguageTask",
    "Mix",
    "RankingTask",
    "Task",
    "TrainSettings",
    "infer_sequences",
    "language_batches",
    "score_sequences",
    "train",
]

M = TypeVar("M")
Module = Callable[..., Tensor]
Log = Callable[[dict[str, Any]], None]
AfterEpoch = Callable[[int, int], None]
"""Called with the steps taken and those of the whole training."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    learning_rate: float
    batch_size: int
    epochs: float
    warmup_ratio: float
    final_lr_ratio: float
    cutting: Cutting
    log_every: int
    seed: int
    max_steps: int | None = None

    def steps(self, examples: int) -> int:
        """Optimizer steps in all."""
        total = max(1, round(self.steps_per_epoch(examples) * self.epochs))
        return min(total, self.max_steps) if self.max_steps else total

    def steps_per_epoch(self, examples: int) -> int:
        """Each epoch drops its last, short batch unless there is no other."""
        return max(1, examples // self.batch_size)


class Task(Protocol[M]):
    @property
    def sizes(self) -> Sequence[int]:
        """Tokens of each example."""
        ...

    def cut(self, rows: Sequence[int], cutting: Cutting, device: torch.device) -> list[M]:
        """The examples `rows` as micro-batches."""
        ...

    def dummy(self, device: torch.device) -> M:
        """A micro-batch for ranks that have run out of their own; it counts zero."""
        ...

    def denominator(self, rows: Sequence[int]) -> float:
        """What `rows` add to the number that the minibatch's loss is divided by."""
        ...

    def loss(self, module: Module, micro_batch: M, denominator: float) -> Tensor: ...

    def take_metrics(self) -> dict[str, float]:
        """What this rank's losses since the last call add to the record, for each name a share that the ranks sum up.

        The same names on every rank.
        """
        ...


@dataclass(frozen=True, slots=True)
class Mix:
    """A second task, whose loss joins the first one's in every optimizer step."""

    name: str
    """of its loss in the records"""
    task: Task[Any]
    coef: float
    batch_size: int
    """examples a step; all of them where there are fewer"""
    seed: int
    """of its own shuffles"""


def train(
    learner: Learner,
    task: Task[Any],
    settings: TrainSettings,
    log: Log,
    mix: Mix | None = None,
    after_epoch: AfterEpoch | None = None,
) -> dict[str, float]:
    """Run all steps; `log` gets a record of the first and of every `log_every`-th. Returns the last one's numbers.

    With a `mix` a step's loss is task + coef * mix, each over its own minibatch, and each is logged as it is.
    `after_epoch` is called on all ranks at the end of every epoch, and after the last step in any case.
    """
    total, per_epoch = settings.steps(len(task.sizes)), settings.steps_per_epoch(len(task.sizes))
    warmup = round(settings.warmup_ratio * total)
    dummy, record = (0, task.dummy(learner.device)), dict[str, float]()
    start, tokens = perf_counter(), 0
    for step, terms in zip(range(total), _terms(task, mix, settings), strict=False):
        rate = cosine_with_warmup(step, total, settings.learning_rate, warmup, settings.final_lr_ratio)
        losses, norm = _take_step(learner, terms, settings.cutting, dummy, rate)
        tokens += sum(term.task.sizes[i] for term in terms for i in term.batch)
        shares = losses | task.take_metrics()
        if step == 0 or (step + 1) % settings.log_every == 0 or step + 1 == total:
            elapsed = perf_counter() - start
            record = _sum_over_ranks(shares, learner.device)
            record |= {"grad_norm": norm, "learning_rate": rate, "tokens_per_s": tokens / elapsed}
            log({"step": step + 1, "steps": total, "elapsed_s": elapsed, **record})
        if after_epoch is not None and ((step + 1) % per_epoch == 0 or step + 1 == total):
            paused = perf_counter()
            after_epoch(step + 1, total)
            start += perf_counter() - paused  # what is logged is the speed of training alone
    return record


def _sum_over_ranks(shares: dict[str, float], device: torch.device) -> dict[str, float]:
    total = all_reduce_sum(torch.tensor(list(shares.values()), dtype=torch.float64, device=device))
    return dict(zip(shares, total.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class _Term:
    """One of the losses that an optimizer step adds up."""

    name: str
    task: Task[Any]
    coef: float
    batch: list[int]
    """its minibatch, over all ranks"""


def _terms(task: Task[Any], mix: Mix | None, settings: TrainSettings) -> Iterator[list[_Term]]:
    """What each step adds up, without end; the task's minibatches are the same with a mix and without."""
    batches = _batches(len(task.sizes), settings)
    if mix is None:
        yield from ([_Term("loss", task, 1.0, batch)] for batch in batches)
    else:
        others = _batches(len(mix.task.sizes), replace(settings, batch_size=mix.batch_size, seed=mix.seed))
        for batch, other in zip(batches, others, strict=False):
            yield [_Term("loss", task, 1.0, batch), _Term(mix.name, mix.task, mix.coef, other)]


def _take_step(
    learner: Learner, terms: Sequence[_Term], cutting: Cutting, dummy: tuple[int, Any], rate: float
) -> tuple[dict[str, float], float]:
    """(this rank's share of each term's loss by its name, the gradient's norm) of one step on the sum of coef * loss.

    A micro-batch belongs to one term, whose number comes with it.
    """
    rows = [(number, i) for number, term in enumerate(terms) for i in term.batch]
    shares = balance([terms[number].task.sizes[i] for number, i in rows], learner.world_size)
    mine = [rows[i] for i in shares[learner.rank]]
    denominators = [term.task.denominator(term.batch) for term in terms]
    losses = {term.name: 0.0 for term in terms}

    def loss(module: Module, numbered: tuple[int, Any]) -> Tensor:
        number, micro_batch = numbered
        value = terms[number].task.loss(module, micro_batch, denominators[number])
        if numbered is not dummy:
            losses[terms[number].name] += float(value.detach())
        return terms[number].coef * value

    micro_batches = [
        (number, micro_batch)
        for number, term in enumerate(terms)
        for micro_batch in term.task.cut([i for n, i in mine if n == number], cutting, learner.device)
    ]
    result = learner.train_step(loss, micro_batches, dummy, rate)
    return losses, result["grad_norm"]


def _batches(examples: int, settings: TrainSettings) -> Iterator[list[int]]:
    """Endless minibatches in a fresh shuffle each epoch, the same on every rank."""
    size, epoch = min(settings.batch_size, examples), 0
    while True:
        order = epoch_order(examples, settings.seed, epoch)
        for start in range(0, examples - size + 1, size):
            yield [int(i) for i in order[start : start + size]]
        epoch += 1


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
        positions = spans(layout.starts, [_first_learned(e) for e in mine], [len(e.tokens) for e in mine])
        batches.append(LanguageBatch(layout, positions))
    return batches


def _first_learned(example: LMExample) -> int:
    return max(1, example.prompt_tokens)


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
    ranks = torch.tensor([rank for e in examples for rank in e.ranks], device=device)
    prompts = torch.tensor([i for i, e in enumerate(examples) for _ in e.responses], device=device)
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
    return layout.starts + torch.tensor([len(s) - 1 for s in sequences], device=layout.starts.device)
