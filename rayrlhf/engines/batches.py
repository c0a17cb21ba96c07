"""Rollouts and experiences as micro-batches of tensors.

A micro-batch holds B rows of T tokens, padded on the right, cut by a token budget (B x T <= budget), rows of like
length together so that little is padding. The N response tokens of all its rows are addressed by flat positions,
so nothing past a response is ever scored, averaged or learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayrlhf.data.batching import micro_batches, pad_rows
from rayrlhf.types import Experience, Rollout

__all__ = ["ExperienceBatch", "RolloutBatch", "cut_experiences", "cut_rollouts", "dummy_experience", "dummy_rollout"]


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    rollouts: tuple[Rollout, ...]
    tokens: Tensor
    """int64 [B, T]"""
    positions: Tensor
    """int64 [N]: flat indices of the response tokens, row by row"""

    @property
    def lengths(self) -> list[int]:
        """R of each row; they add up to N."""
        return [r.info.response_tokens for r in self.rollouts]

    @property
    def last_positions(self) -> Tensor:
        """int64 [B]: flat index of each row's last response token."""
        return self.positions[torch.tensor(self.lengths).cumsum(0).to(self.positions.device) - 1]


@dataclass(frozen=True, slots=True)
class ExperienceBatch:
    batch: RolloutBatch
    old_logprobs: Tensor
    """float32 [N], as are the rest"""
    advantages: Tensor
    returns: Tensor
    old_values: Tensor
    mask: Tensor
    """bool [N]: False nowhere but in a dummy"""


def cut_rollouts(rollouts: Sequence[Rollout], budget: int, device: torch.device) -> list[RolloutBatch]:
    """Micro-batches of at most `budget` padded tokens."""
    lengths = [r.info.tokens for r in rollouts]
    return [_collate([rollouts[i] for i in rows], device) for rows in micro_batches(lengths, budget)]


def cut_experiences(experiences: Sequence[Experience], budget: int, device: torch.device) -> list[ExperienceBatch]:
    lengths = [e.rollout.info.tokens for e in experiences]
    return [_collate_experience([experiences[i] for i in rows], device) for rows in micro_batches(lengths, budget)]


def dummy_rollout(like: Rollout, device: torch.device) -> RolloutBatch:
    """What a rank runs when others still have work: `like`, whose results nobody reads."""
    return _collate([like], device)


def dummy_experience(like: Experience, device: torch.device) -> ExperienceBatch:
    """As `dummy_rollout`, with an empty mask: its loss is 0."""
    batch = _collate_experience([like], device)
    mask = torch.zeros_like(batch.mask)
    return ExperienceBatch(batch.batch, batch.old_logprobs, batch.advantages, batch.returns, batch.old_values, mask)


def _collate(rollouts: Sequence[Rollout], device: torch.device) -> RolloutBatch:
    tokens = torch.from_numpy(pad_rows([r.tokens for r in rollouts], 0, np.int64))
    width = tokens.shape[1]
    positions = [
        torch.arange(row * width + r.prompt_tokens, row * width + r.info.tokens) for row, r in enumerate(rollouts)
    ]
    return RolloutBatch(tuple(rollouts), tokens.to(device), torch.cat(positions).to(device))


def _collate_experience(experiences: Sequence[Experience], device: torch.device) -> ExperienceBatch:
    def flat(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(e, name) for e in experiences])).to(device)

    batch = _collate([e.rollout for e in experiences], device)
    mask = torch.ones(batch.positions.shape[0], dtype=torch.bool, device=device)
    return ExperienceBatch(batch, flat("old_logprobs"), flat("advantages"), flat("returns"), flat("old_values"), mask)
