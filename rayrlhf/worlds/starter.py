"""The starter world: a few thousand records in the language of `rayrlhf.worlds.language`, from a seeded generator.

`make demo` needs text, demonstrations, rankings and prompts that a tiny model can learn from in minutes, with nothing
to download. The simulated labelers rank by the language's exact rule with some noise, so quality stays measurable.

The text holds exercises in the very wording of the instructions, answered and then marked "right" or "wrong" straight
after the full stop: a reward model can only prefer right content if pretraining taught it to verify content.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from rayrlhf.worlds.language import (
    ALL_THINGS,
    CONTRAST,
    COURTESY,
    RAMBLE,
    RUDE,
    THINGS,
    Task,
    a,
    is_word,
    listing,
    tasks,
    verdict,
)

__all__ = ["write_starter"]

Record = dict[str, object]

TEXTS, DEMONSTRATIONS, RANKINGS, HELD_OUT, PROMPTS = 1500, 600, 400, 120, 400
RESPONSES = 4
"""K: how many responses a labeler ranks at once."""
FLAWED_DEMONSTRATIONS = 0.6
"""High on purpose: with flawless demonstrations SFT would leave PPO nothing to mend."""
LABELER_NOISE = {"labeler_a": 0.03, "labeler_b": 0.10}
"""How often each labeler misjudges whether a response is right."""

# ---- what people write


def respond(rng: random.Random, task: Task, right: bool, style: str = "good") -> str:
    """A response of the given content and style: good, rude, rambling, or blunt (deaf to the tone asked for)."""
    choices = task.right if right else task.wrong
    if task.tone == "one word" and style != "blunt":
        choices = tuple(filter(is_word, choices))
    # By length first: otherwise the many ways to go wrong at one length would hide the few at another.
    length = rng.choice(sorted({len(choice.split()) for choice in choices}))
    parts = [rng.choice([choice for choice in choices if len(choice.split()) == length])]
    if style == "rude":
        parts.insert(0, rng.choice(RUDE))
    elif (task.tone == "polite") != (style == "blunt"):
        parts.insert(0, rng.choice(COURTESY))
    if style == "rambling":
        parts.append(rng.choice(RAMBLE))
    return " ".join(parts)


def flawed(rng: random.Random, task: Task) -> str:
    """A response that is wrong, or rude, or rambling, or blunt, or two of these."""
    if rng.random() < 0.5:
        return respond(rng, task, False, rng.choice(("good", "good", "rude")))
    return respond(rng, task, True, rng.choice(("rude", "rambling", "blunt") if task.tone else ("rude", "rambling")))


def draw(rng: random.Random, pool: Sequence[Task], count: int) -> list[Task]:
    """That many distinct tasks, as many of each kind as of any other, shuffled."""
    kinds = sorted({task.kind for task in pool})
    rng.shuffle(kinds)
    drawn = []
    for number, kind in enumerate(kinds):
        share = count // len(kinds) + (number < count % len(kinds))
        drawn += rng.sample([task for task in pool if task.kind == kind], share)
    rng.shuffle(drawn)
    return drawn


def ranking(rng: random.Random, task: Task) -> Record:
    """K distinct responses and one labeler's dense ranks; never all tied, since that would teach nothing."""
    source = rng.choice(sorted(LABELER_NOISE))
    while True:
        made = [respond(rng, task, True)]
        while len(made) < RESPONSES:
            response = respond(rng, task, True) if rng.random() < 0.35 else flawed(rng, task)
            made += [response] if response not in made else []
        rng.shuffle(made)
        points = [verdict(task, text).points for text in made]
        seen = [p + (6 if p < 6 else -6) * (rng.random() < LABELER_NOISE[source]) for p in points]
        order = sorted(set(seen), reverse=True)
        if len(order) > 1:
            ranks = [order.index(p) + 1 for p in seen]
            return {"prompt": task.prompt, "responses": made, "ranks": ranks, "source": source}


def demonstration(rng: random.Random, task: Task) -> Record:
    """One person's response: the careless ones are flawed more often than not."""
    bad = rng.random() < FLAWED_DEMONSTRATIONS
    response = flawed(rng, task) if bad else respond(rng, task, True)
    return {"prompt": task.prompt, "response": response, "source": rng.choice(("writer_a", "writer_b"))}


# ---- text to pretrain on


def exercise(rng: random.Random, task: Task) -> str:
    """An instruction, an answer, and the mark for its content; manners vary so that the mark ignores them."""
    right = rng.random() < 0.5
    response = respond(rng, task, right, rng.choice(("good", "good", "good", "rude", "rambling", "blunt")))
    return f"{task.prompt} {response} {'right' if verdict(task, response).right else 'wrong'}"


def about_things(rng: random.Random) -> str:
    """What two things are, and what they are not."""
    lines = []
    for thing in rng.sample(ALL_THINGS, 2):
        traits = rng.sample(thing.traits, 4)
        lacks = CONTRAST[rng.choice(thing.traits[1:])]
        lines += [f"{a(thing.name)} is {a(thing.kind)}. {a(thing.name)} is {listing(traits)}. it is not {lacks}."]
    return "\n".join(lines)


def about_words(rng: random.Random) -> str:
    """Opposites, kinds and counting."""
    pairs = [f"the opposite of {word} is {CONTRAST[word]}." for word in rng.sample(sorted(CONTRAST), 2)]
    kind = rng.choice(sorted(THINGS))
    members = rng.sample([thing.name for thing in ALL_THINGS if thing.kind == kind], rng.randint(2, 4))
    start, end = sorted(rng.sample(range(1, 13), 2))
    counted = f"count from {start} to {end}: {', '.join(map(str, range(start, end + 1)))}."
    lines = [*pairs, f"{listing(members)} are {len(members)} {kind}s.", counted, f"{start} is less than {end}."]
    return " ".join(rng.sample(lines, len(lines)))


def text(rng: random.Random, pool: Sequence[Task]) -> Record:
    """One document: exercises two times in three, plain statements otherwise."""
    if rng.random() < 2 / 3:
        return {"text": "\n".join(exercise(rng, task) for task in draw(rng, pool, 3))}
    return {"text": rng.choice((about_things, about_words))(rng)}


def write_starter(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Write the five files of the world; the same seed gives the same bytes.

    Each file draws from its own generator, so changing one leaves the others as they were. No held-out prompt occurs
    in any other file, the exercises in the text included.
    """
    rngs = {name: random.Random(f"{seed} {name}") for name in ("held", "text", "demo", "rank", "prompt")}
    held = draw(rngs["held"], tasks(), HELD_OUT)
    unseen = {task.prompt for task in held}
    pool = [task for task in tasks() if task.prompt not in unseen]
    records: dict[str, list[Record]] = {
        "text": [text(rngs["text"], pool) for _ in range(TEXTS)],
        "demonstrations": [demonstration(rngs["demo"], t) for t in draw(rngs["demo"], pool, DEMONSTRATIONS)],
        "rankings": [ranking(rngs["rank"], t) for t in draw(rngs["rank"], pool, RANKINGS)],
        "heldout_rankings": [ranking(rngs["held"], t) for t in held],
        "prompts": [{"prompt": t.prompt, "source": "starter"} for t in draw(rngs["prompt"], pool, PROMPTS)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in records}
    for name, path in paths.items():
        lines = "".join(json.dumps(record) + "\n" for record in records[name])
        path.write_text(lines, encoding="utf-8", newline="\n")
    return paths
