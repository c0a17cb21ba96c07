"""Cutting a step's sequences into balanced ranks, micro-batches and padded rows. Plain arithmetic, deterministic."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import DTypeLike

__all__ = ["Cut", "Cutting", "SampleOrder", "balance", "epoch_order", "micro_batches", "pad_rows"]


@dataclass(frozen=True, slots=True)
class Cutting:
    """How sequences become micro-batches."""

    tokens: int
    """of a micro-batch at most, padding included"""
    packed: bool = True
    """Several sequences share a row; else each has its own, padded to the longest."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One micro-batch: rows of equal width."""

    units: list[int]
    rows: list[list[tuple[int, int]]]
    """per row its sequences from left to right, each (unit, which of the unit's sequences)"""
    width: int


def balance(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal sequences to ranks so that the ranks' token sums are near equal.

    Longest first, each to the rank with the fewest tokens so far (Graham's LPT rule: the largest sum is at most
    4/3 of the best possible).

    Args:
        lengths: tokens of each sequence.
        ranks: how many shares to make.

    Returns:
        The indices of each rank, ascending; every index once. With fewer sequences than ranks some are empty.

    Raises:
        ValueError: `ranks` is less than 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}, expected 1 or more")
    shares: list[list[int]] = [[] for _ in range(ranks)]
    # (tokens, sequences, rank): the count breaks ties, so that sequences of no tokens are spread out too.
    loads = [(0, 0, rank) for rank in range(ranks)]
    for index in _longest_first(lengths):
        tokens, count, rank = loads[0]
        shares[rank].append(index)
        heapq.heapreplace(loads, (tokens + lengths[index], count + 1, rank))
    return [sorted(share) for share in shares]


def micro_batches(units: Sequence[Sequence[int]], cutting: Cutting) -> list[Cut]:
    """Group units into micro-batches of at most `cutting.tokens` tokens: rows x width.

    Sequences of like length come together, longest first, so little is padding; packed, each goes to the first row
    that has room for it. A unit over the limit gets a micro-batch of its own.

    Args:
        units: what may not be parted (a response, or all responses to a prompt): the tokens of each sequence in it.

    Returns:
        Micro-batches; every unit is in one of them; none is empty.

    Raises:
        ValueError: `cutting.tokens` is less than 1.
    """
    if cutting.tokens < 1:
        raise ValueError(f"micro-batches of {cutting.tokens} tokens, expected 1 or more")
    cuts: list[Cut] = []
    room: list[int] = []
    longest = [max(lengths, default=0) for lengths in units]
    for unit in _longest_first(longest):
        placed = _place(units[unit], list(room), cuts[-1].width, cutting.packed) if cuts else None
        if placed is None or len(placed[1]) * cuts[-1].width > cutting.tokens:
            # Longest first: the first unit of a micro-batch is as wide as all that follow.
            cuts.append(Cut([], [], longest[unit]))
            placed = _place(units[unit], [], longest[unit], cutting.packed)
        rows, room = placed
        cuts[-1].units.append(unit)
        cuts[-1].rows.extend([] for _ in range(len(room) - len(cuts[-1].rows)))
        for sequence, row in enumerate(rows):
            cuts[-1].rows[row].append((unit, sequence))
    return cuts


def _place(lengths: Sequence[int], room: list[int], width: int, packed: bool) -> tuple[list[int], list[int]]:
    """(The row of each sequence, the room left in each row), rows opened where needed."""
    rows = []
    for length in lengths:
        row = next((r for r, free in enumerate(room) if packed and free >= length), len(room))
        if row == len(room):
            room.append(width)
        room[row] -= length
        rows.append(row)
    return rows, room


def pad_rows(rows: Sequence[np.ndarray], value: float, dtype: DTypeLike) -> np.ndarray:
    """Rows [T_b] of any lengths -> dtype [B, T_max], filled up with `value` on the right; [0, 0] for no rows."""
    width = max((len(row) for row in rows), default=0)
    padded = np.full((len(rows), width), value, dtype=dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n]: a permutation of range(n), fresh for each epoch and the same for the same (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class SampleOrder:
    """Which prompt each sample of a run answers, samples being numbered from 0 without an end.

    Each epoch visits every prompt once, in a fresh shuffle, for `repeats` samples in a row.
    """

    def __init__(self, prompt_ids: Sequence[int], seed: int, repeats: int = 1) -> None:
        self._prompt_ids = prompt_ids
        self._repeats = repeats
        # A step's samples may lie in two epochs.
        self._epoch = lru_cache(maxsize=2)(partial(epoch_order, len(prompt_ids), seed))

    def __call__(self, sample: int) -> tuple[int, int, int]:
        """Its epoch, prompt id, and index among the prompt's samples of that epoch."""
        place, index = divmod(sample, self._repeats)
        epoch, place = divmod(place, len(self._prompt_ids))
        return epoch, self._prompt_ids[int(self._epoch(epoch)[place])], index


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
