"""What the four models say of rollouts: log-probs (policy, reference), values (value), rewards (reward).

Each consumes `Rollout`s and produces `Scores`, and works with a learner or a frozen model alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rayrlhf.data.batching import Cutting
from rayrlhf.engines.batches import Layout, RolloutBatch, cut_rollouts, dummy_rollout, last_tokens, lay_out
from rayrlhf.engines.deepspeed import FrozenModel, Learner
from rayrlhf.errors import ModelError
from rayrlhf.rewards.base import Failure, outcome
from rayrlhf.types import Rollout, Scores
from rayrlhf.weights.probe import ProbeRow

__all__ = ["check_packing", "probe_logprobs", "score_logprobs", "score_rewards", "score_values"]

Module = Callable[..., Tensor]
# Rounding of another order of summation, in shares of the output.
PACKING_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}


def score_logprobs(
    engine: Learner | FrozenModel, rollouts: Sequence[Rollout], spare: Rollout, cutting: Cutting, temperature: float
) -> Scores:
    """Log-probs of each response token at the sampling temperature.

    Args:
        rollouts: this rank's share; may be empty.
        spare: any rollout, run when other ranks have more micro-batches than this one.
        cutting: into micro-batches, each a forward pass.
    """

    def forward(module: Module, batch: RolloutBatch) -> Tensor:
        return module(**batch.layout.inputs, positions=batch.positions, temperature=temperature)

    return Scores(logprobs=_per_token(engine, forward, rollouts, spare, cutting))


def score_values(
    engine: Learner | FrozenModel, rollouts: Sequence[Rollout], spare: Rollout, cutting: Cutting
) -> Scores:
    """The value before each response token, read where that token is predicted: one position earlier."""

    def forward(module: Module, batch: RolloutBatch) -> Tensor:
        return module(**batch.layout.inputs, positions=batch.positions - 1)

    return Scores(values=_per_token(engine, forward, rollouts, spare, cutting))


def score_rewards(
    engine: Learner | FrozenModel, rollouts: Sequence[Rollout], spare: Rollout, cutting: Cutting
) -> Scores:
    """One reward per response, read at its last token: the EOS when there is one; not finite, it has `failed`."""

    def forward(module: Module, batch: RolloutBatch) -> Tensor:
        return module(**batch.layout.inputs, positions=batch.last_positions)

    batches = cut_rollouts(rollouts, cutting, engine.device)
    results = engine.infer(forward, batches, dummy_rollout(spare, engine.device))
    scores = Scores()
    for batch, result in zip(batches, results, strict=True):
        for rollout, value in zip(batch.rollouts, result.tolist(), strict=True):
            found = outcome(value, "model: the score")
            if isinstance(found, Failure):
                scores.failed[rollout.info.sample_id] = found.reason
            else:
                scores.rewards[rollout.info.sample_id] = found
    return scores


def probe_logprobs(engine: Learner, rows: Sequence[ProbeRow]) -> list[float]:
    """Log-probs (temperature 1) of each row's targets after its context, row after row: the publish probe."""
    tokens = torch.tensor([row.context for row in rows], device=engine.device)
    targets = torch.tensor([row.targets for row in rows], device=engine.device)
    ends = torch.arange(1, len(rows) + 1, device=engine.device) * tokens.shape[1]

    def forward(module: Module, batch: Tensor) -> Tensor:
        return module(tokens=batch, positions=ends, targets=targets)

    return [float(x) for x in engine.infer(forward, [tokens], tokens)[0].reshape(-1).tolist()]


def check_packing(engine: Learner | FrozenModel, dtype: str) -> None:
    """Raise ModelError when the model's output for a sequence depends on what else is in its row."""
    rows = [np.arange(start, start + length) for start, length in ((1, 6), (7, 3), (10, 3))]

    def forward(module: Module, layout: Layout) -> Tensor:
        return module(**layout.inputs, positions=last_tokens(layout, [len(rows[i]) for i in layout.units])).float()

    def outputs(packed: bool) -> Tensor:
        layout = lay_out([[r] for r in rows], Cutting(18, packed), engine.device)[0]
        return engine.infer(forward, [layout], layout)[0]

    apart, together = outputs(packed=False), outputs(packed=True)
    gap = float((apart - together).abs().max() / (1 + apart.abs().max()))
    if not gap <= PACKING_TOLERANCE[dtype]:
        raise ModelError(
            f"sequences that share a row change each other's outputs by {gap:.2g}: this architecture does not keep "
            "them apart",
            "set model.packed=false",
        )


def _per_token(
    engine: Learner | FrozenModel,
    forward: Callable[[Module, RolloutBatch], Tensor],
    rollouts: Sequence[Rollout],
    spare: Rollout,
    cutting: Cutting,
) -> dict[int, np.ndarray]:
    batches = cut_rollouts(rollouts, cutting, engine.device)
    results = engine.infer(forward, batches, dummy_rollout(spare, engine.device))
    rows: dict[int, np.ndarray] = {}
    for batch, result in zip(batches, results, strict=True):
        parts = torch.split(result.float().cpu(), batch.lengths)
        rows.update((r.info.sample_id, p.numpy()) for r, p in zip(batch.rollouts, parts, strict=True))
    return rows
