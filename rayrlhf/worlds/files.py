"""A world written to files, in the formats that a user's own data would have."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rayrlhf.errors import DataError
from rayrlhf.worlds.base import World
from rayrlhf.worlds.labelers import PANEL, judge_ranking

__all__ = ["write_world"]

Record = dict[str, Any]
# A world that repeats itself so often has fewer prompts than its sizes ask for.
MOST_REPEATS = 10_000
HELD_OUT = ("heldout_prompts", "heldout_rankings")
TRAINING = ("demonstrations", "rankings", "ranking_prompts", "prompts")
# Of a ranking of contractors' answers; `collect` ranks a policy's own.
RANKED_ANSWERS = 4


def write_world(world: World, folder: Path, seed: int, size: float = 1.0) -> dict[str, Path]:
    """Write every file of the world; the same seed gives the same bytes. Returns their paths by `data` key.

    A prompt occurs in one file only, demonstrations and rankings included. What is written about the prompts of a file
    comes from a generator of its own.

    Args:
        size: share of the world's own sizes; every file has at least a few records.
    """

    def count(name: str) -> int:
        full: int = getattr(world.sizes, name)
        return max(min(full, 8), round(full * size))

    prompts = _deal(world, seed, {name: count(name) for name in (*HELD_OUT, *TRAINING)})

    def plain(rng: random.Random, name: str) -> Iterator[Record]:
        return ({"prompt": prompt, "source": world.kind(prompt)} for prompt in prompts[name])

    def demonstrations(rng: random.Random, name: str) -> Iterator[Record]:
        for prompt in prompts[name]:
            response, source = world.demonstration(rng, prompt)
            yield {"prompt": prompt, "response": response, "source": source}

    def rankings(rng: random.Random, name: str) -> Iterator[Record]:
        return (_ranking(world, rng, prompt) for prompt in prompts[name])

    def text(rng: random.Random, name: str) -> Iterator[Record]:
        return ({"text": world.document(rng)} for _ in range(count(name)))

    def multiple_choice(rng: random.Random, name: str) -> Iterator[Record]:
        return (asdict(choice) for _ in range(count(name)) if (choice := world.cloze(rng)) is not None)

    makers: Mapping[str, Callable[[random.Random, str], Iterator[Record]]] = {
        "text": text,
        "heldout_prompts": plain,
        "heldout_rankings": rankings,
        "demonstrations": demonstrations,
        "rankings": rankings,
        "ranking_prompts": plain,
        "prompts": plain,
        "multiple_choice": multiple_choice,
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in makers}
    for name, make in makers.items():
        lines = "".join(json.dumps(record) + "\n" for record in make(random.Random(f"{seed} {name}"), name))
        paths[name].write_text(lines, encoding="utf-8", newline="\n")
    return {name: path for name, path in paths.items() if path.stat().st_size}


def _deal(world: World, seed: int, counts: Mapping[str, int]) -> dict[str, list[str]]:
    """Distinct prompts for each file, dealt in random order: a kind with few of them has its share of every file.

    One file after the other would leave the last ones without such kinds, and PPO would never see what eval asks.
    """
    dealt: dict[str, list[str]] = {name: [] for name in counts}
    seen = set[str]()
    for names, heldout in ((HELD_OUT, True), (TRAINING, False)):
        rng = random.Random(f"{seed} {'heldout' if heldout else 'training'} prompts")
        turns = [name for name in names for _ in range(counts[name])]
        rng.shuffle(turns)
        found = _distinct(partial(world.prompt, rng, heldout), len(turns), seen)
        for name, prompt in zip(turns, found, strict=True):
            dealt[name].append(prompt)
    return dealt


def _distinct(draw: Callable[[], str], count: int, seen: set[str]) -> Iterator[str]:
    """`count` prompts that are not in `seen`, and from then on are."""
    repeats = 0
    while count:
        prompt = draw()
        if prompt in seen:
            repeats += 1
            if repeats > MOST_REPEATS:
                raise DataError(
                    "the world has too few distinct prompts for its sizes", "lower World.sizes, or widen it"
                )
            continue
        seen.add(prompt)
        repeats, count = 0, count - 1
        yield prompt


def _ranking(world: World, rng: random.Random, prompt: str) -> Record:
    """Contractors' answers ranked by one labeler; all different, or the prompt has too few answers for that."""
    answers: dict[str, None] = {}
    for _ in range(50):
        if len(answers) < RANKED_ANSWERS:
            answers[world.demonstration(rng, prompt)[0]] = None
    responses = list(answers)
    labeler = rng.choice(PANEL)
    flags = [world.flags(prompt, response, True) for response in responses]
    return {
        "prompt": prompt,
        "responses": responses,
        "ranks": judge_ranking(rng, labeler, flags, world.weights),
        "source": labeler.name,
    }
