"""One PPO step as one process does it with PyTorch and transformers alone, the way TRL's PPOTrainer works.

generate   one batched `generate` of left-padded prompts, until the longest response is done
score      old and reference log-probs, values and the score, over micro-batches padded on the right
estimate   KL-penalised token rewards, GAE, whitening
update     policy and value, minibatch by minibatch, gradients accumulated over padded micro-batches

It shares no code with the product but the config, and leaves out what the product does for safety: no guard, no metric,
no fingerprint. Passes over whole sequences need no attention mask, and logits are computed for response tokens alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lengths import NICE
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, logging

from rayrlhf.config.ppo import PPOConfig

__all__ = ["PlainPPO", "Work", "hush", "serve"]

PAD = 1
# Before the first update of a step old and new log-probs come from the same weights.
FIRST_RATIO = 1e-3


@dataclass(frozen=True, slots=True)
class Work:
    """What the process needs to know."""

    sft: str
    reward: str
    prompts: list[np.ndarray]
    lengths: Sequence[int]
    """of the responses, in the order of the prompts"""
    ppo: PPOConfig
    rows: int
    """sequences a micro-batch, in order of arrival"""
    threads: int


def hush() -> None:
    """Let transformers keep its bars and its reports of loaded models to itself."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def serve(pipe: Connection, work: Work) -> None:
    """One step for every message but None; answers with what `PlainPPO.step` returns."""
    os.nice(NICE - os.nice(0))
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    hush()
    trainer = PlainPPO(work)
    pipe.send("ready")
    while pipe.recv() is not None:
        pipe.send(trainer.step())


@dataclass(frozen=True, slots=True)
class _Scored:
    """Of each response [R_i], or padded [B, R]."""

    sequences: list[Tensor]
    logprobs: list[Tensor]
    values: list[Tensor]
    advantages: list[Tensor]
    returns: list[Tensor]


class PlainPPO:
    def __init__(self, work: Work) -> None:
        def load(kind: Any, path: str) -> Any:
            return kind.from_pretrained(path, dtype=torch.float32).eval()

        self.work = work
        self.policy, self.reference = (load(AutoModelForCausalLM, work.sft) for _ in range(2))
        self.reward, self.value = (load(AutoModelForSequenceClassification, work.reward) for _ in range(2))
        # A response ends where it is told to, not at an EOS.
        self.policy.generation_config.eos_token_id = None
        self.optimizers = [
            torch.optim.AdamW(
                model.parameters(), rate, work.ppo.adam.betas, work.ppo.adam.eps, weight_decay=0.0, fused=True
            )
            for model, rate in (
                (self.policy, work.ppo.learning_rate),
                (self.value, work.ppo.value_learning_rate),
            )
        ]
        self.starts = [len(prompt) for prompt in work.prompts]
        self.shuffle = np.random.default_rng(0)

    def step(self) -> dict[str, Any]:
        """Seconds by phase, and what was done."""
        marks = [perf_counter()]
        sequences = self._generate()
        marks.append(perf_counter())
        logprobs, reference, values, scores = self._score(sequences)
        marks.append(perf_counter())
        batch = self._estimate(sequences, logprobs, reference, values, scores)
        marks.append(perf_counter())
        done = self._update(batch)
        marks.append(perf_counter())
        seconds = dict(zip(("generate", "score", "estimate", "update"), np.diff(marks).tolist(), strict=True))
        sampled = sum(len(s) for s in sequences) - sum(self.starts)
        return {"seconds": seconds, "step": marks[-1] - marks[0], "sampled": sampled, **done}

    @torch.no_grad()
    def _generate(self) -> list[Tensor]:
        prompts = [torch.from_numpy(p).long() for p in self.work.prompts]
        tokens = pad_sequence(prompts, batch_first=True, padding_value=PAD, padding_side="left")
        mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
        done = self.policy.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=max(self.work.lengths),
            pad_token_id=PAD,
        )
        responses = done[:, tokens.shape[1] :]
        # Rows that have ended are computed on beside the others, as `generate` does; here they are cut.
        return [torch.cat([p, r[:n]]) for p, r, n in zip(prompts, responses, self.work.lengths, strict=True)]

    @torch.no_grad()
    def _score(self, sequences: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        logprobs, reference, values, scores = [], [], [], []
        for rows in self._cut(range(len(sequences))):
            tokens, positions, lengths = self._lay_out(sequences, rows)
            logprobs += _logprobs(self.policy, tokens, positions).split(lengths)
            reference += _logprobs(self.reference, tokens, positions).split(lengths)
            values += _scalars(self.value, tokens, positions - 1).split(lengths)
            last = positions[torch.tensor(lengths).cumsum(0) - 1]
            scores.append(_scalars(self.reward, tokens, last))
        return logprobs, reference, values, torch.cat(scores)

    @torch.no_grad()
    def _estimate(
        self,
        sequences: list[Tensor],
        logprobs: list[Tensor],
        reference: list[Tensor],
        values: list[Tensor],
        scores: Tensor,
    ) -> _Scored:
        ppo, lengths = self.work.ppo, [len(row) for row in logprobs]
        rewards = -ppo.kl.coef * (_padded(logprobs) - _padded(reference))
        rewards[torch.arange(len(lengths)), torch.tensor(lengths) - 1] += scores
        values_BR = _padded(values)
        following = torch.cat([values_BR[:, 1:], torch.zeros(len(lengths), 1)], 1)
        deltas = rewards + ppo.gamma * following - values_BR
        advantages, running = torch.zeros_like(deltas), torch.zeros(len(lengths))
        for t in reversed(range(deltas.shape[1])):  # what is padding has delta 0
            advantages[:, t] = running = deltas[:, t] + ppo.gamma * ppo.lam * running
        returns = advantages + values_BR
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        white = (advantages - advantages[mask].mean()) * (advantages[mask].var(correction=0) + 1e-8).rsqrt()

        def rows(padded: Tensor) -> list[Tensor]:
            return [row[:n] for row, n in zip(padded, lengths, strict=True)]

        return _Scored(sequences, logprobs, values, rows(white), rows(returns))

    def _update(self, batch: _Scored) -> dict[str, Any]:
        trained = steps = 0
        order = self.shuffle.permutation(len(batch.sequences)).tolist()
        for start in range(0, len(order), self.work.ppo.minibatch_size):
            minibatch = order[start : start + self.work.ppo.minibatch_size]
            tokens = sum(len(batch.logprobs[i]) for i in minibatch)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            ratio = max(self._accumulate(batch, rows, tokens) for rows in self._cut(minibatch))
            if steps == 0 and not ratio <= FIRST_RATIO:
                raise SystemExit(f"the plain loop's first minibatch saw log ratios up to {ratio}, where they must be 0")
            for model, optimizer in zip((self.policy, self.value), self.optimizers, strict=True):
                nn.utils.clip_grad_norm_(model.parameters(), self.work.ppo.adam.grad_clip)
                optimizer.step()
            trained, steps = trained + tokens, steps + 1
        return {"trained": trained, "minibatches": steps}

    def _accumulate(self, batch: _Scored, rows: Sequence[int], total: int) -> float:
        """Gradients of one micro-batch's share of both losses; its largest |log ratio|."""
        ppo = self.work.ppo
        tokens, positions, _ = self._lay_out(batch.sequences, rows)
        old, advantages, old_values, returns = (
            torch.cat([column[i] for i in rows])
            for column in (batch.logprobs, batch.advantages, batch.values, batch.returns)
        )
        log_ratio = _logprobs(self.policy, tokens, positions) - old
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - ppo.clip, 1 + ppo.clip)
        (-torch.minimum(ratio * advantages, clipped * advantages).sum() / total).backward()
        values = _scalars(self.value, tokens, positions - 1)
        near = old_values + (values - old_values).clamp(-ppo.value_clip, ppo.value_clip)
        (torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum() / 2 / total).backward()
        return float(log_ratio.detach().abs().max())

    def _cut(self, rows: Sequence[int]) -> Iterator[Sequence[int]]:
        return (rows[i : i + self.work.rows] for i in range(0, len(rows), self.work.rows))

    def _lay_out(self, sequences: Sequence[Tensor], rows: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """int64 [B, T] padded on the right, flat positions of the response tokens [N], response tokens of each row."""
        tokens = pad_sequence([sequences[i] for i in rows], batch_first=True, padding_value=PAD)
        width = tokens.shape[1]
        spans = [torch.arange(b * width + self.starts[i], b * width + len(sequences[i])) for b, i in enumerate(rows)]
        return tokens, torch.cat(spans), [len(span) for span in spans]


def _logprobs(lm: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    """[N]: of the tokens at flat positions. Rows are padded on the right, so that causality alone hides the padding."""
    hidden = lm.model(input_ids=tokens, use_cache=False).last_hidden_state
    logits = lm.lm_head(hidden.flatten(0, 1)[positions - 1])
    return -cross_entropy(logits, tokens.flatten()[positions], reduction="none")


def _scalars(classifier: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    """[N]: the head's output at flat positions."""
    hidden = classifier.model(input_ids=tokens, use_cache=False).last_hidden_state
    return classifier.score(hidden.flatten(0, 1)[positions]).squeeze(-1)


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)
