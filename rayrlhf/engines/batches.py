"""Sequences as micro-batches of tensors: rollouts and experiences here, the supervised tasks' in tasks.py.

A micro-batch holds B rows of T tokens within a token budget: several sequences a row with positions of their own
(packed, no sequence sees another), or one a row, padded on the right. Tokens are addressed by flat positions in
B x T, so nothing past a response is ever scored, averaged or learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rayrlhf.data.batching import Cut, Cutting, micro_batches
from rayrlhf.types import Experience, Rollout

__all__ = [
    "ExperienceBatch",
    "Layout",
    "RolloutBatch",
    "cut_experiences",
    "cut_rollouts",
    "dummy_experience",
    "dummy_rollout",
    "last_tokens",
    "lay_out",
    "spans",
    "to_device",
]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the sequences of a micro-batch lie."""

    units: tuple[int, ...]
    """which of the units it was cut from it holds, in order"""
    tokens: Tensor
    """int64 [B, T]"""
    position_ids: Tensor | None
    """int64 [B, T]: each sequence counts from 0, as does the padding; None where no row holds two sequences"""
    starts: Tensor
    """int64 [S], on the host: flat index of each sequence's first token, unit by unit"""

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        """What a model's forward pass needs of it."""
        return {"tokens": self.tokens, "position_ids": self.position_ids}


def lay_out(units: Sequence[Sequence[np.ndarray]], cutting: Cutting, device: torch.device) -> list[Layout]:
    """Micro-batches of `units`, each one or more token rows [T_i] that stay together."""
    cuts = micro_batches([[len(sequence) for sequence in unit] for unit in units], cutting)
    return [_layout(units, cut, device) for cut in cuts]


def spans(layout: Layout, first: Sequence[int], end: Sequence[int]) -> Tensor:
    """Flat positions of tokens first_i ... end_i - 1 of each sequence: int64 [sum of end_i - first_i]."""
    ranges = [torch.arange(s + a, s + b) for s, a, b in zip(layout.starts.tolist(), first, end, strict=True)]
    return to_device(torch.cat(ranges), layout.tokens.device)


def last_tokens(layout: Layout, lengths: Sequence[int]) -> Tensor:
    """Flat position of each sequence's last token: int64 [S]."""
    return to_device(layout.starts + torch.tensor(lengths) - 1, layout.tokens.device)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A tensor made here, where it is computed with: to a GPU from page-locked memory, which nobody waits for."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _layout(units: Sequence[Sequence[np.ndarray]], cut: Cut, device: torch.device) -> Layout:
    tokens, position_ids = np.zeros((2, len(cut.rows), cut.width), dtype=np.int64)
    starts: dict[tuple[int, int], int] = {}
    for row, members in enumerate(cut.rows):
        offset = 0
        for unit, sequence in members:
            length = len(units[unit][sequence])
            tokens[row, offset : offset + length] = units[unit][sequence]
            position_ids[row, offset : offset + length] = np.arange(length)
            starts[unit, sequence] = row * cut.width + offset
            offset += length
        position_ids[row, offset:] = np.arange(cut.width - offset)
    order = [starts[unit, sequence] for unit in cut.units for sequence in range(len(units[unit]))]
    packed = any(len(members) > 1 for members in cut.rows)
    return Layout(
        tuple(cut.units),
        to_device(torch.from_numpy(tokens), device),
        to_device(torch.from_numpy(position_ids), device) if packed else None,
        torch.tensor(order, dtype=torch.int64),
    )


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    rollouts: tuple[Rollout, ...]
    layout: Layout
    positions: Tensor
    """int64 [N]: flat indices of the response tokens, rollout by rollout"""

    @property
    def lengths(self) -> list[int]:
        """R of each rollout; they add up to N."""
        return [r.info.response_tokens for r in self.rollouts]

    @property
    def last_positions(self) -> Tensor:
        """int64 [B]: flat index of each rollout's last response token."""
        return self.positions[to_device(torch.tensor(self.lengths).cumsum(0) - 1, self.positions.device)]


@dataclass(frozen=True, slots=True)
class ExperienceBatch:
    batch: RolloutBatch
    old_logprobs: Tensor
    """float32 [N], as are the rest"""
    advantages: Tensor
    returns: Tensor | None
    old_values: Tensor | None
    weights: Tensor | None
    mask: Tensor
    """bool [N]: False in a dummy, and in a response that is not trained on"""


def cut_rollouts(rollouts: Sequence[Rollout], cutting: Cutting, device: torch.device) -> list[RolloutBatch]:
    layouts = lay_out([[r.tokens] for r in rollouts], cutting, device)
    return [_rollout_batch([rollouts[i] for i in layout.units], layout) for layout in layouts]


def cut_experiences(experiences: Sequence[Experience], cutting: Cutting, device: torch.device) -> list[ExperienceBatch]:
    layouts = lay_out([[e.rollout.tokens] for e in experiences], cutting, device)
    return [_experience_batch([experiences[i] for i in layout.units], layout) for layout in layouts]


def dummy_rollout(like: Rollout, device: torch.device) -> RolloutBatch:
    """What a rank runs when others still have work: `like`, whose results nobody reads."""
    return cut_rollouts([like], Cutting(like.info.tokens), device)[0]


def dummy_experience(like: Experience, device: torch.device) -> ExperienceBatch:
    """As `dummy_rollout`, with an empty mask: its loss is 0."""
    batch = cut_experiences([like], Cutting(like.rollout.info.tokens), device)[0]
    return replace(batch, mask=torch.zeros_like(batch.mask))


def _rollout_batch(rollouts: Sequence[Rollout], layout: Layout) -> RolloutBatch:
    first, end = [r.prompt_tokens for r in rollouts], [r.info.tokens for r in rollouts]
    return RolloutBatch(tuple(rollouts), layout, spans(layout, first, end))


def _experience_batch(experiences: Sequence[Experience], layout: Layout) -> ExperienceBatch:
    device = layout.tokens.device

    def flat(name: str) -> Tensor:
        return to_device(torch.from_numpy(np.concatenate([getattr(e, name) for e in experiences])), device)

    def optional(name: str) -> Tensor | None:
        return None if getattr(experiences[0], name) is None else flat(name)

    return ExperienceBatch(
        batch=_rollout_batch([e.rollout for e in experiences], layout),
        old_logprobs=flat("old_logprobs"),
        advantages=flat("advantages"),
        returns=optional("returns"),
        old_values=optional("old_values"),
        weights=optional("weights"),
        mask=to_device(torch.tensor([e.trained for e in experiences for _ in e.old_logprobs]), device),
    )
