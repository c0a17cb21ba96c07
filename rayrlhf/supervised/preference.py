"""Direct preference optimisation on one rank: the task that `train` of loop.py runs, and its checks. No Ray.

The reference is the policy itself before its first step: the log-probs that it gives each response are taken once and
kept as numbers, so that no second model is held. Every pair's loss is then log 2 at the start, which is checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayrlhf.algorithms import dpo_loss
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import RankingExample
from rayrlhf.engines.batches import Layout, lay_out, spans, to_device
from rayrlhf.engines.deepspeed import Learner
from rayrlhf.errors import TrainingError
from rayrlhf.supervised.loop import Log, Module
from rayrlhf.supervised.ranking import infer_sequences

__all__ = ["PreferenceTask", "checking_first_loss", "response_logprobs"]

# How far the first loss may be from log 2. Rounding: the reference pass packs the responses otherwise.
FIRST_LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
# Rankings between two signs of life of a pass over all of them.
RANKINGS_A_REPORT = 256


@dataclass(frozen=True, slots=True)
class _PreferenceBatch:
    layout: Layout
    positions: Tensor
    """int64 [N]: the tokens of all responses, response by response"""
    lengths: list[int]
    """tokens of each of the S responses; they add up to N"""
    reference: Tensor
    """float32 [S]: the reference's log-prob of each response, summed over its tokens"""
    chosen: Tensor
    """int64 [P]: for each pair, which of the S responses is the better one"""
    rejected: Tensor
    """int64 [P]: ... and which the worse"""


class PreferenceTask:
    """All pairs of each ranking that are no ties, one pass per response (Rafailov et al. 2023, eq. 7).

    The loss is a mean over the pairs of the global minibatch: a ranking of K responses weighs as much as the C(K, 2)
    comparisons it stands for. (`RankingTask` gives every prompt the same weight.)
    """

    def __init__(self, examples: Sequence[RankingExample], reference: Sequence[Sequence[float]], beta: float) -> None:
        """
        Args:
            examples: each with at least one pair that is no tie.
            reference: `response_logprobs` of the model before its first step, for the same examples.
            beta: the strength of the pull to the reference.
        """
        self.examples = examples
        self.reference = reference
        self.beta = beta
        self.sizes = [sum(len(r) for r in e.responses) for e in examples]
        self._noted: list[Tensor] = []

    def cut(self, rows: Sequence[int], cutting: Cutting, device: torch.device) -> list[_PreferenceBatch]:
        layouts = lay_out([self.examples[i].responses for i in rows], cutting, device)
        return [self._batch([rows[i] for i in layout.units], layout) for layout in layouts]

    def dummy(self, device: torch.device) -> _PreferenceBatch:
        """The smallest example, without its pairs: neither its loss nor its metrics count."""
        smallest = int(np.argmin(self.sizes))
        batch = self.cut([smallest], Cutting(self.sizes[smallest]), device)[0]
        return replace(batch, chosen=batch.chosen[:0], rejected=batch.rejected[:0])

    def denominator(self, rows: Sequence[int]) -> float:
        """Pairs that are no ties."""
        return float(sum(1 for i in rows for _ in self.examples[i].pairs()))

    def loss(self, module: Module, micro_batch: _PreferenceBatch, denominator: float) -> Tensor:
        b = micro_batch
        policy = _by_response(module(**b.layout.inputs, positions=b.positions), b.lengths)
        self._note(policy.detach() - b.reference, b, denominator)
        chosen, rejected = b.chosen, b.rejected
        return dpo_loss(
            policy[chosen], policy[rejected], b.reference[chosen], b.reference[rejected], self.beta, denominator
        )

    def take_metrics(self) -> dict[str, float]:
        """Means over the pairs of the global minibatch; the implicit reward is beta * (policy - reference) log-prob.

        Returns:
            `accuracy`, the share of pairs whose chosen response has the larger implicit reward (equal ones count
            half; at the first step all are equal, and rounding decides); `margin`, by how much larger it is;
            `chosen_log_ratio` and `rejected_log_ratio`, policy - reference in nats per response.
        """
        names = ("accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio")
        noted, self._noted = torch.stack(self._noted).sum(0).tolist(), []
        return dict(zip(names, noted, strict=True))

    def _note(self, log_ratio: Tensor, batch: _PreferenceBatch, denominator: float) -> None:
        chosen, rejected = log_ratio[batch.chosen].double(), log_ratio[batch.rejected].double()
        margin = self.beta * (chosen - rejected)
        won = (margin.sign() + 1) / 2
        self._noted.append(torch.stack([x.sum() for x in (won, margin, chosen, rejected)]) / denominator)

    def _batch(self, rows: Sequence[int], layout: Layout) -> _PreferenceBatch:
        device = layout.tokens.device
        examples = [self.examples[i] for i in rows]
        first = [_first_token(e) for e in examples for _ in e.responses]
        end = [len(response) for e in examples for response in e.responses]
        pairs, responses = [], 0
        for example in examples:
            pairs += [(responses + better, responses + worse) for better, worse in example.pairs()]
            responses += len(example.responses)
        chosen, rejected = to_device(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2), device).unbind(1)
        return _PreferenceBatch(
            layout,
            spans(layout, first, end),
            [b - a for a, b in zip(first, end, strict=True)],
            to_device(torch.tensor([x for i in rows for x in self.reference[i]], dtype=torch.float32), device),
            chosen,
            rejected,
        )


def response_logprobs(
    learner: Learner, examples: Sequence[RankingExample], cutting: Cutting, report: Log, phase: str
) -> list[list[float]]:
    """The log-prob of each response, summed over its tokens, by example; shared out over the ranks, returned on all.

    Args:
        report: hears of `phase` every so often: a pass over all rankings may outlast `cluster.call_timeout_s`.
    """
    found: list[list[float]] = []
    for start in range(0, len(examples), RANKINGS_A_REPORT):
        report({"phase": phase})
        found += _response_logprobs(learner, examples[start : start + RANKINGS_A_REPORT], cutting)
    return found


def _response_logprobs(learner: Learner, examples: Sequence[RankingExample], cutting: Cutting) -> list[list[float]]:
    sequences = [response for e in examples for response in e.responses]
    first = [_first_token(e) for e in examples for _ in e.responses]

    def forward(module: Module, layout: Layout, held: Sequence[int]) -> Tensor:
        starts, ends = [first[i] for i in held], [len(sequences[i]) for i in held]
        logprobs = module(**layout.inputs, positions=spans(layout, starts, ends))
        return _by_response(logprobs, [b - a for a, b in zip(starts, ends, strict=True)])

    numbers = iter(infer_sequences(learner, sequences, forward, cutting))
    return [[next(numbers) for _ in e.responses] for e in examples]


def checking_first_loss(log: Log, dtype: str) -> Log:
    """`log`, which raises TrainingError once it has written a first step that does not lose log 2."""

    def checked(record: dict[str, Any]) -> None:
        log(record)
        if record.get("step") != 1:
            return
        gap, allowed = abs(record["loss"] - math.log(2)), FIRST_LOSS_TOLERANCE[dtype]
        if not gap <= allowed:
            raise TrainingError(
                f"dpo's first loss is {record['loss']:.6g} where a policy equal to its reference loses log 2, 0.693147 "
                f"(allowed {allowed:g} apart)",
                "the reference's log-probs come from other weights, tokens or positions, from a model with dropout, or "
                "from sequences that see each other in their row (model.packed=false keeps them apart)",
            )

    return checked


def _by_response(logprobs: Tensor, lengths: Sequence[int]) -> Tensor:
    """[N] of tokens -> [S] sums."""
    return torch.stack([part.sum() for part in torch.split(logprobs, list(lengths))])


def _first_token(example: RankingExample) -> int:
    """Of the response; never a sequence's first, which nothing predicts."""
    return max(1, example.prompt_tokens)
