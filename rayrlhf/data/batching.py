"""Cutting a step's sequences into balanced ranks, micro-batches and padded rows. Plain arithmetic, deterministic."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

__all__ = ["balance", "epoch_order", "micro_batches", "pad_rows"]


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


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group sequences so that each group, padded to its longest row, takes at most `budget` tokens.

    Groups hold sequences of like length, longest first, so little of them is padding. A sequence longer than the
    budget gets a group of its own.

    Args:
        lengths: tokens of each sequence.
        budget: rows x longest row of a micro-batch, in tokens.

    Returns:
        Groups of indices; every index once; no group is empty.

    Raises:
        ValueError: `budget` is less than 1.
    """
    if budget < 1:
        raise ValueError(f"budget is {budget} tokens, expected 1 or more")
    groups: list[list[int]] = []
    for index in _longest_first(lengths):
        # Longest first: the first row of a group is the one that the others are padded to.
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


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


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
