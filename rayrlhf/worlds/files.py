"""A world written to files, in the formats that a user's own data would have."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rayrlhf.errors import DataError
from rayrlhf.worlds.base import World
from rayrlhf.worlds.labelers import PANEL, judge_ranking

__all__ = ["write_world"]

Record = dict[str, Any]
# A world that repeats itself so often has fewer prompts than its sizes ask for.
MOST_REPEATS = 10_000
# Of a ranking of contractors' answers; `collect` ranks a policy's own.
RANKED_ANSWERS = 4


def write_world(world: World, folder: Path, seed: int, size: float = 1.0) -> dict[str, Path]:
    """Write every file of the world; the same seed gives the same bytes. Returns their paths by `data` key.

    Each file draws from its own generator, so changing one leaves the others as they were. No two held-out prompts of
    a file are the same, and what is held out occurs in no other file.

    Args:
        size: share of the world's own sizes; every file has at least a few records.
    """

    def count(name: str) -> int:
        full: int = getattr(world.sizes, name)
        return max(min(full, 8), round(full * size))

    def prompts(rng: random.Random, name: str) -> Iterator[str]:
        if name.startswith("heldout"):
            return _distinct(lambda: world.prompt(rng, True), count(name))
        return (world.prompt(rng, False) for _ in range(count(name)))

    def plain(rng: random.Random, name: str) -> Iterator[Record]:
        return ({"prompt": prompt, "source": world.kind(prompt)} for prompt in prompts(rng, name))

    def demonstrations(rng: random.Random, name: str) -> Iterator[Record]:
        for prompt in prompts(rng, name):
            response, source = world.demonstration(rng, prompt)
            yield {"prompt": prompt, "response": response, "source": source}

    def rankings(rng: random.Random, name: str) -> Iterator[Record]:
        return (_ranking(world, rng, prompt) for prompt in prompts(rng, name))

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
        # Two runs may write the same world at a time: neither may read the other's half.
        part = paths[name].with_suffix(f".{os.getpid()}.part")
        part.write_text(lines, encoding="utf-8", newline="\n")
        part.replace(paths[name])
    return {name: path for name, path in paths.items() if path.stat().st_size}


def _distinct(draw: Callable[[], str], count: int) -> Iterator[str]:
    """`count` prompts that all differ."""
    repeats, seen = 0, set[str]()
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
        **judge_ranking(rng, labeler, flags, world.weights),
        "source": labeler.name,
    }
