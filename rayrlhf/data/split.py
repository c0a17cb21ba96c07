"""Which records train: the split by prompt (records that share one never part), and no judgement twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Protocol, TypeVar

from rayrlhf.errors import ConfigError
from rayrlhf.types import Ranking, Turns

__all__ = ["drop_implied", "split_by_prompt"]


class _Prompted(Protocol):
    @property
    def prompt(self) -> Turns: ...


Record = TypeVar("Record", bound=_Prompted)


def split_by_prompt(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, held_out), each in the order given; about `fraction` of the prompts are held out.

    A prompt's side depends on its text and `seed` alone, so it keeps its side when records are added. With a
    fraction above 0 and at least two distinct prompts, neither side is empty.

    Raises:
        ConfigError: `fraction` is not in [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(f"held-out fraction is {fraction}, expected 0 <= fraction < 1", "0.1 holds out a tenth")
    places = {record.prompt: _place(record.prompt, seed) for record in records}
    held_out = {prompt for prompt, place in places.items() if place < fraction}
    if fraction > 0 and len(places) >= 2:
        by_place = sorted(places, key=lambda prompt: places[prompt])
        held_out |= {by_place[0]}
        held_out -= {by_place[-1]}
    return (
        [record for record in records if record.prompt not in held_out],
        [record for record in records if record.prompt in held_out],
    )


def _place(prompt: Turns, seed: int) -> float:
    """Where a prompt falls in [0, 1). hashlib, since hash() differs from process to process."""
    digest = hashlib.sha256(json.dumps([seed, prompt]).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def drop_implied(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Leave out pairs that a longer ranking of the same prompt already holds, in the same order.

    A judgement that stands both as a pair and inside a ranking would otherwise be trained twice. Order is kept.
    """
    held: dict[Turns, list[dict[str, int]]] = {}
    for ranking in rankings:
        if len(ranking.responses) > 2:
            held.setdefault(ranking.prompt, []).append(dict(zip(ranking.responses, ranking.ranks, strict=True)))

    def implied(pair: Ranking) -> bool:
        (a, b), (rank_a, rank_b) = pair.responses, pair.ranks
        tables = (t for t in held.get(pair.prompt, []) if a in t and b in t)
        return any((t[a] < t[b]) == (rank_a < rank_b) and (t[a] > t[b]) == (rank_a > rank_b) for t in tables)

    return [r for r in rankings if len(r.responses) > 2 or not implied(r)]
