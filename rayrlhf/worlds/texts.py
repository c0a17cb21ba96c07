"""Plain pretraining text: what things are like, opposites, and stories that no instruction ever touches."""

from __future__ import annotations

import random

from rayrlhf.worlds.base import Choice
from rayrlhf.worlds.words import ALL_THINGS, DAYS, FOODS, MEMBERS, NAMES, OPPOSITE, PLACES, WEATHER, a, listing

__all__ = ["about_opposites", "about_things", "about_town", "question", "story"]

# What only the text says of its own words, and how it says it.
_TABLES = (
    ("after {} comes", dict(zip(DAYS, (*DAYS[1:], DAYS[0]), strict=True))),
    ("at the {} people buy", dict(zip(PLACES, FOODS, strict=True))),
    ("on {} days people go to the", dict(zip(WEATHER, PLACES, strict=False))),
)


def about_things(rng: random.Random) -> str:
    """What three things are, and what they are not."""
    lines = []
    for thing in rng.sample(tuple(ALL_THINGS.values()), 3):
        traits = rng.sample(thing.traits, 4)
        lacks = OPPOSITE[rng.choice(thing.traits[1:])]
        lines.append(f"{a(thing.name)} is {a(thing.kind)}. {a(thing.name)} is {listing(traits)}. it is not {lacks}.")
    return "\n".join(lines)


def about_opposites(rng: random.Random) -> str:
    """Opposites, kinds and numbers."""
    pairs = [f"the opposite of {word} is {OPPOSITE[word]}." for word in rng.sample(sorted(OPPOSITE), 3)]
    kind = rng.choice(tuple(MEMBERS))
    members = rng.sample(MEMBERS[kind], rng.randint(2, 4))
    start, end = sorted(rng.sample(range(1, 13), 2))
    counted = f"count from {start} to {end}: {', '.join(map(str, range(start, end + 1)))}."
    lines = [*pairs, f"{listing(members)} are {len(members)} {kind}s.", counted]
    return " ".join(rng.sample(lines, len(lines)))


def about_town(rng: random.Random) -> str:
    """Days, shops and weather: what only this text teaches."""
    lines = []
    for _ in range(5):
        wording, table = rng.choice(_TABLES)
        word = rng.choice(tuple(table))
        lines.append(f"{wording.format(word)} {table[word]}.")
    return " ".join(lines)


def story(rng: random.Random) -> str:
    """A day, the weather, two people who go places and hand things on, and how it ends."""
    lines, ending = _tell(rng)
    return " ".join([*lines, f"{ending.prompt} {ending.choices[ending.answer]}."])


def question(rng: random.Random) -> Choice:
    """What the town's text says, as often as a story whose end is left open: who moved where, and who holds what."""
    if rng.random() < 0.5:
        wording, table = rng.choice(_TABLES)
        word = rng.choice(tuple(table))
        return _choice(rng, wording.format(word), table[word], tuple(table.values()))
    lines, ending = _tell(rng)
    return Choice(" ".join([*lines, ending.prompt]), ending.choices, ending.answer)


def _tell(rng: random.Random) -> tuple[list[str], Choice]:
    day = rng.randrange(7)
    people, foods = rng.sample(NAMES, 3), rng.sample(FOODS, 3)
    place = dict(zip(people, rng.sample(PLACES, 3), strict=True))
    holds = dict(zip(people, foods, strict=True))
    lines = [f"on {DAYS[day]} it was {rng.choice(WEATHER)}."]
    lines += [f"{who} was at the {place[who]} with {holds[who]}." for who in people[:2]]
    for _ in range(rng.randint(1, 2)):
        who, other = rng.sample(people[:2], 2)
        if rng.random() < 0.5:
            place[who] = rng.choice([p for p in PLACES if p not in place.values()])
            lines.append(f"{who} went to the {place[who]}.")
        else:
            holds[who], holds[other] = holds[other], holds[who]
            lines.append(f"{who} and {other} swapped what they had.")
    who = rng.choice(people[:2])
    asked = rng.randrange(3)
    if asked == 0:
        return lines, _choice(rng, f"in the end {who} was at the", place[who], PLACES)
    if asked == 1:
        return lines, _choice(rng, f"in the end {who} had the", holds[who], FOODS)
    return lines, _choice(rng, "the next day was", DAYS[(day + 1) % 7], DAYS)


def _choice(rng: random.Random, prompt: str, right: str, words: tuple[str, ...]) -> Choice:
    choices = [right, *rng.sample([word for word in words if word != right], 3)]
    rng.shuffle(choices)
    return Choice(prompt, tuple(choices), choices.index(right))
