"""What the four models say of rollouts: log-probs (policy, reference), values (value), rewards (reward).

Each consumes `Rollout`s and produces `Scores`, and works with a learner or a frozen model alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rayrlhf.engines.batches import RolloutBatch, cut_rollouts, dummy_rollout
from rayrlhf.engines.deepspeed import FrozenModel, Learner
from rayrlhf.types import Rollout, Scores

__all__ = ["probe_logprobs", "score_logprobs", "score_rewards", "score_values"]

Module = Callable[..., Tensor]


def score_logprobs(
    engine: Learner | FrozenModel, rollouts: Sequence[Rollout], spare: Rollout, budget: int, temperature: float
) -> Scores:
    """Log-probs of each response token at the sampling temperature.

    Args:
        rollouts: this rank's share; may be empty.
        spare: any rollout, run when other ranks have more micro-batches than this one.
        budget: padded tokens per forward pass.
    """

    def forward(module: Module, batch: RolloutBatch) -> Tensor:
        return module(tokens=batch.tokens, positions=batch.positions, temperature=temperature)

    return Scores(logprobs=_per_token(engine, forward, rollouts, spare, budget))


def score_values(engine: Learner | FrozenModel, rollouts: Sequence[Rollout], spare: Rollout, budget: int) -> Scores:
    """The value before each response token, read where that token is predicted: one position earlier."""

    def forward(module: Module, batch: RolloutBatch) -> Tensor:
        return module(tokens=batch.tokens, positions=batch.positions - 1)

    return Scores(values=_per_token(engine, forward, rollouts, spare, budget))


def score_rewards(engine: Learner | FrozenModel, rollouts: Sequence[Rollout], spare: Rollout, budget: int) -> Scores:
    """One reward per response, read at its last token: the EOS when there is one."""

    def forward(module: Module, batch: RolloutBatch) -> Tensor:
        return module(tokens=batch.tokens, positions=batch.last_positions)

    batches = cut_rollouts(rollouts, budget, engine.device)
    results = engine.infer(forward, batches, dummy_rollout(spare, engine.device))
    scores = Scores()
    for batch, result in zip(batches, results, strict=True):
        for rollout, value in zip(batch.rollouts, result.tolist(), strict=True):
            scores.rewards[rollout.info.sample_id] = value
    return scores


def probe_logprobs(engine: Learner, rows: list[list[int]]) -> list[float]:
    """Log-probs (temperature 1) of the tokens of equally long rows from the second on: the publish probe."""
    tokens = torch.tensor(rows, device=engine.device)
    height, width = tokens.shape
    positions = torch.arange(height * width, device=engine.device).reshape(height, width)[:, 1:].reshape(-1)

    def forward(module: Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return module(tokens=batch[0], positions=batch[1], temperature=1.0)

    return [float(x) for x in engine.infer(forward, [(tokens, positions)], (tokens, positions))[0].tolist()]


def _per_token(
    engine: Learner | FrozenModel,
    forward: Callable[[Module, RolloutBatch], Tensor],
    rollouts: Sequence[Rollout],
    spare: Rollout,
    budget: int,
) -> dict[int, np.ndarray]:
    batches = cut_rollouts(rollouts, budget, engine.device)
    results = engine.infer(forward, batches, dummy_rollout(spare, engine.device))
    rows: dict[int, np.ndarray] = {}
    for batch, result in zip(batches, results, strict=True):
        parts = torch.split(result.float().cpu(), batch.lengths)
        rows.update((r.info.sample_id, p.numpy()) for r, p in zip(batch.rollouts, parts, strict=True))
    return rows
