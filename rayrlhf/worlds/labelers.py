"""Simulated labelers: people who see a response's flags through noise, weigh them by tastes of their own, and rank.

Each labeler overlooks or imagines flags now and then (content more often than manners: it is the hardest to judge),
values some flags more than others do, and says it on a 7-point Likert scale, so near-equal responses tie.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PANEL", "Labeler", "judge_ranking", "likert", "ranks", "see"]


@dataclass(frozen=True, slots=True)
class Labeler:
    """One person."""

    name: str
    noise: float
    """Chance to misjudge the flag of the greatest weight; a fifth of it for each of the others."""
    tastes: Mapping[str, float] = field(default_factory=dict)
    """For some flags, how many times more (or less) than a common reader this labeler values them."""


PANEL = (
    Labeler("labeler_1", 0.15),
    Labeler("labeler_2", 0.15, {"civil": 2.0, "concise": 0.5}),
    Labeler("labeler_3", 0.15, {"concise": 2.0}),
    Labeler("labeler_4", 0.16, {"manner": 2.0}),
    Labeler("labeler_5", 0.20, {"manner": 0.5, "civil": 0.5}),
)
"""The people who rank in the built-in world; each ranks its share of the prompts."""


def see(
    rng: random.Random, labeler: Labeler, flags: Mapping[str, bool], weights: Mapping[str, float]
) -> dict[str, bool]:
    """The yes/no answers that this labeler would give about a response."""
    greatest = max(weights, key=lambda flag: weights[flag])
    chance = {flag: labeler.noise if flag == greatest else labeler.noise / 5 for flag in flags}
    return {flag: held != (rng.random() < chance[flag]) for flag, held in flags.items()}


def likert(labeler: Labeler, seen: Mapping[str, bool], weights: Mapping[str, float]) -> int:
    """Overall quality from 1 to 7, of the flags as this labeler sees and values them."""
    valued = {flag: weight * labeler.tastes.get(flag, 1.0) for flag, weight in weights.items()}
    share = sum(value for flag, value in valued.items() if seen[flag]) / sum(valued.values())
    return 1 + round(6 * share)


def judge_ranking(
    rng: random.Random, labeler: Labeler, flags: Sequence[Mapping[str, bool]], weights: Mapping[str, float]
) -> dict[str, Any]:
    """What this labeler says of the responses with these flags, as fields of a ranking's record.

    `flags` as seen, response by response; `likert`, 1 to 7 each; `ranks`, by the latter, ties included.
    """
    seen = [see(rng, labeler, row, weights) for row in flags]
    overall = [likert(labeler, row, weights) for row in seen]
    return {"ranks": ranks(overall), "likert": overall, "flags": seen}


def ranks(scores: Sequence[float]) -> list[int]:
    """Dense ranks, 1 for the highest score; equal scores tie."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) + 1 for score in scores]
