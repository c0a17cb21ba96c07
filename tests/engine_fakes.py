"""What stands in for DeepSpeed: engines that call the module, and tiny models and rollouts to run through them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rayrlhf.engines import distributed, estimation, learning, tasks
from rayrlhf.engines.batches import spans
from rayrlhf.models.build import PolicyModel, ScalarModel
from rayrlhf.supervised import loop, ranking
from rayrlhf.types import Experience, Rollout, RolloutInfo

CPU = torch.device("cpu")
VOCAB = 23


class PlainEngine:
    """`Learner` and `FrozenModel` in one process: no sharding, no optimizer unless `sgd` is set.

    `pad_with` fills the padding with random tokens before the module sees it.
    """

    device = CPU

    def __init__(
        self,
        module: nn.Module | Callable[..., Tensor],
        sgd: bool = False,
        pad_with: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.module, self.pad_with, self.sgd = module, pad_with, sgd
        self.rank, self.world_size = rank, world_size
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.cuts: list[int] = []

    def infer(self, function: Callable[..., Any], micro_batches: Sequence[Any], dummy: Any) -> list[Any]:
        with torch.no_grad():
            # As DeepSpeed's engine: a rank without work runs the dummy, whose results nobody reads.
            results = [function(self.module, self._junk(m)) for m in micro_batches or [dummy]]
        return results[: len(micro_batches)]

    def train_step(
        self,
        loss_function: Callable[..., Tensor],
        micro_batches: Sequence[Any],
        dummy: Any,
        learning_rate: float,
        rest: Sequence[Any] = (),
        measure: bool = False,
    ) -> dict[str, float]:
        parameters = list(self.module.parameters()) if isinstance(self.module, nn.Module) else []
        for p in parameters:
            p.grad = None
        total = 0.0
        counted = [*micro_batches, *rest]
        for m in counted or [dummy]:  # as DeepSpeed's learner: no rank sits a step out
            loss = loss_function(self.module, m) * (1.0 if counted else 0.0)
            total += float(loss.detach())
            if parameters:
                loss.backward()
        if self.sgd:
            with torch.no_grad():
                for p in parameters:
                    if p.grad is not None:
                        p -= learning_rate * p.grad
        self.rates.append(learning_rate)
        self.losses.append(total)
        self.cuts.append(len(micro_batches))
        norm = float(sum(p.grad.square().sum() for p in parameters if p.grad is not None)) ** 0.5
        return {"loss": total, "grad_norm": norm}

    def _junk(self, batch: Any) -> Any:
        if self.pad_with is None:
            return batch
        tokens = torch.randint(
            VOCAB, batch.layout.tokens.shape, generator=torch.Generator().manual_seed(self.pad_with)
        ).reshape(-1)
        own = spans(batch.layout, [0] * len(batch.rollouts), [r.info.tokens for r in batch.rollouts])
        tokens[own] = batch.layout.tokens.reshape(-1)[own]
        return replace(batch, layout=replace(batch.layout, tokens=tokens.reshape(batch.layout.tokens.shape)))


class Ranks:
    """A process group of threads: the reductions of rayrlhf.engines go through a barrier."""

    def __init__(self, size: int, monkeypatch: Any) -> None:
        self._size = size
        self._barrier = threading.Barrier(size, timeout=20)
        self._mine = threading.local()
        self._slots: list[Any] = [None] * size
        for module in (distributed, estimation, learning, loop, ranking, tasks):
            for name in ("all_reduce_sum", "all_reduce_max"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, getattr(self, name))

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        def work(rank: int) -> Any:
            self._mine.rank = rank
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self._size) as pool:
            return list(pool.map(work, range(self._size)))

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        total = torch.stack(self._gather(values.clone())).sum(0)
        return values.copy_(total)

    def all_reduce_max(self, value: float, device: torch.device) -> float:
        return max(self._gather(value))

    def _gather(self, value: Any) -> list[Any]:
        self._slots[self._mine.rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values


def llama_config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # large enough that the log-probs are far from uniform
        pad_token_id=0,
        **more,
    )


def tiny_policy(seed: int = 0) -> PolicyModel:
    torch.manual_seed(seed)
    return PolicyModel(LlamaForCausalLM(llama_config()))


def tiny_scalar(seed: int = 0) -> ScalarModel:
    torch.manual_seed(seed)
    return ScalarModel(LlamaForSequenceClassification(llama_config(num_labels=1)))


def rollout(sample_id: int, prompt: int, response: int, seed: int = 0) -> Rollout:
    rng = np.random.default_rng([seed, sample_id])
    return Rollout(
        info=RolloutInfo(sample_id, sample_id % 3, prompt + response, response, truncated=sample_id % 2 == 1),
        tokens=rng.integers(0, VOCAB, prompt + response).astype(np.int32),
        logprobs=-rng.random(response).astype(np.float32),
        versions=np.zeros(response, dtype=np.int32),
    )


def rollouts(shapes: Sequence[tuple[int, int]], seed: int = 0) -> list[Rollout]:
    """One per (prompt tokens, response tokens), with sample ids 100, 101, ..."""
    return [rollout(100 + i, p, r, seed) for i, (p, r) in enumerate(shapes)]


SHAPES = [(3, 5), (1, 1), (6, 2), (2, 9), (4, 4), (1, 12), (8, 1)]


def experiences(shapes: Sequence[tuple[int, int]] = SHAPES, seed: int = 0) -> list[Experience]:
    rng = np.random.default_rng(seed)

    def draw(n: int) -> np.ndarray:
        return rng.normal(size=n).astype(np.float32)

    return [
        Experience(r, old_logprobs=draw(n) - 3, advantages=draw(n), returns=draw(n), old_values=draw(n))
        for r in rollouts(shapes, seed)
        for n in [r.info.response_tokens]
    ]
