"""Supervised training on one rank: the loop that pretrain, sft, reward and dpo share. No Ray.

The loop knows no loss: a `Task` says how its examples become micro-batches, what a minibatch is divided by, and what
the loss of a micro-batch is. They are in engines/tasks.py (language modelling), ranking.py and preference.py (dpo). A
`Mix` adds a second task's loss to every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from rayrlhf.data.batching import Cutting, balance, epoch_order
from rayrlhf.engines.deepspeed import Learner
from rayrlhf.engines.distributed import all_reduce_sum
from rayrlhf.engines.schedule import cosine_with_warmup

__all__ = ["Checkpoints", "Mix", "Progress", "Task", "TrainSettings", "train"]

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


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is: all that the loop itself must know to go on. What comes next follows from the step."""

    step: int = 0
    """how many are done"""
    tokens: int = 0
    elapsed_s: float = 0.0
    record: Mapping[str, float] = field(default_factory=dict)
    """the numbers of the last one logged"""


class Checkpoints(Protocol):
    """What `train` goes on from, and where it leaves what is to go on from; called on all ranks."""

    def begin(self) -> Progress:
        """Learner and random states become what they were after that progress; nothing is done where nothing is."""
        ...

    def after_step(self, progress: Progress, steps: int) -> None:
        """Save, if it is time to; `steps` is how many the whole training has.

        Raises:
            Stopped: training is to end here.
        """
        ...


def train(
    learner: Learner,
    task: Task[Any],
    settings: TrainSettings,
    log: Log,
    mix: Mix | None = None,
    after_epoch: AfterEpoch | None = None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Run all steps; `log` gets a record of the first and of every `log_every`-th. Returns the last one's numbers.

    With a `mix` a step's loss is task + coef * mix, each over its own minibatch, and each is logged as it is.
    `after_epoch` is called on all ranks at the end of every epoch, and after the last step in any case; `checkpoints`
    after it.
    """
    total, per_epoch = settings.steps(len(task.sizes)), settings.steps_per_epoch(len(task.sizes))
    warmup = round(settings.warmup_ratio * total)
    dummy, done = _Piece(0, task.dummy(learner.device)), checkpoints.begin() if checkpoints else Progress()
    start, tokens, record = perf_counter() - done.elapsed_s, done.tokens, dict(done.record)
    for step, terms in zip(range(done.step, total), _terms(task, mix, settings, done.step), strict=False):
        rate = cosine_with_warmup(step, total, settings.learning_rate, warmup, settings.final_lr_ratio)
        losses, norm = _take_step(learner, terms, settings.cutting, dummy, rate)
        tokens += sum(term.task.sizes[i] for term in terms for i in term.batch)
        shares = losses | task.take_metrics()
        if step == 0 or (step + 1) % settings.log_every == 0 or step + 1 == total:
            elapsed = perf_counter() - start
            record = _sum_over_ranks(shares, learner.device)
            record |= {"grad_norm": norm, "learning_rate": rate, "tokens_per_s": tokens / elapsed}
            log({"step": step + 1, "steps": total, "elapsed_s": elapsed, **record})
        judged = after_epoch if (step + 1) % per_epoch == 0 or step + 1 == total else None
        if judged or checkpoints:
            paused = perf_counter()
            if judged:
                judged(step + 1, total)
            if checkpoints:
                checkpoints.after_step(Progress(step + 1, tokens, paused - start, record), total)
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


@dataclass(frozen=True, slots=True)
class _Piece:
    """A micro-batch, and the number of the term that it belongs to."""

    term: int
    batch: Any


def _terms(task: Task[Any], mix: Mix | None, settings: TrainSettings, done: int) -> Iterator[list[_Term]]:
    """What each step after those `done` adds up, without end; the task's minibatches are the same with a mix and
    without."""
    batches = _batches(len(task.sizes), settings, done)
    if mix is None:
        yield from ([_Term("loss", task, 1.0, batch)] for batch in batches)
    else:
        others = _batches(len(mix.task.sizes), replace(settings, batch_size=mix.batch_size, seed=mix.seed), done)
        for batch, other in zip(batches, others, strict=False):
            yield [_Term("loss", task, 1.0, batch), _Term(mix.name, mix.task, mix.coef, other)]


def _take_step(
    learner: Learner, terms: Sequence[_Term], cutting: Cutting, dummy: _Piece, rate: float
) -> tuple[dict[str, float], float]:
    """One step on the sum of coef * loss: (this rank's share of each term's loss by name, the gradient's norm)."""
    rows = [(number, i) for number, term in enumerate(terms) for i in term.batch]
    shares = balance([terms[number].task.sizes[i] for number, i in rows], learner.world_size)
    mine = [rows[i] for i in shares[learner.rank]]
    denominators = [term.task.denominator(term.batch) for term in terms]
    losses = {term.name: 0.0 for term in terms}

    def loss(module: Module, piece: _Piece) -> Tensor:
        term = terms[piece.term]
        value = term.task.loss(module, piece.batch, denominators[piece.term])
        if piece is not dummy:
            losses[term.name] += float(value.detach())
        return term.coef * value

    micro_batches = [
        _Piece(number, micro_batch)
        for number, term in enumerate(terms)
        for micro_batch in term.task.cut([i for n, i in mine if n == number], cutting, learner.device)
    ]
    result = learner.train_step(loss, micro_batches, dummy, rate)
    return losses, result["grad_norm"]


def _batches(examples: int, settings: TrainSettings, done: int = 0) -> Iterator[list[int]]:
    """Endless minibatches in a fresh shuffle each epoch, the same on every rank; without the first `done`."""
    size = min(settings.batch_size, examples)
    epoch, passed = divmod(done, examples // size)
    while True:
        order = epoch_order(examples, settings.seed, epoch)
        for start in range(passed * size, examples - size + 1, size):
            yield [int(i) for i in order[start : start + size]]
        epoch, passed = epoch + 1, 0
