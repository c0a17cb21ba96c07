"""The words of the instruction language: everyday things with their traits, opposites, people, and stock phrases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "ALL_THINGS",
    "COURTESY",
    "DAYS",
    "FOODS",
    "MEMBERS",
    "NAMES",
    "OPPOSITE",
    "PLACES",
    "RAMBLE",
    "RUDE",
    "SITES",
    "TRAITS",
    "WEATHER",
    "WITH_TRAIT",
    "Thing",
    "a",
    "listing",
]

# kind: name, colour, size, weight, feel
_THINGS = {
    "animal": "cat black small light soft|dog brown small heavy soft|cow white big heavy soft|"
    "crab red small light hard|frog green small light soft",
    "fruit": "apple red small light hard|lemon yellow small light hard|plum blue small light soft|"
    "melon green big heavy hard|banana yellow small light soft",
    "tool": "hammer grey small heavy hard|saw grey big light hard|spade brown big heavy hard|"
    "sponge yellow small light soft|ladder white big heavy hard",
    "garment": "coat blue big heavy soft|sock white small light soft|scarf red big light soft|"
    "boot black small heavy hard|glove green small light soft",
    "vehicle": "bus red big heavy hard|train green big heavy hard|boat white big heavy hard|"
    "sled brown big light hard|van blue big heavy hard",
    "instrument": "drum red big light hard|flute grey small light hard|piano black big heavy hard|"
    "violin brown small light hard|bell yellow small heavy hard",
}
_OPPOSITES = (
    *(("big", "small"), ("heavy", "light"), ("hard", "soft"), ("hot", "cold"), ("fast", "slow"), ("wet", "dry")),
    *(("old", "new"), ("loud", "quiet")),
)
OPPOSITE = dict(_OPPOSITES) | {b: a for a, b in _OPPOSITES}
SITES = ("on the table", "on the shelf", "on the floor", "in the box", "in the bag", "in the barn")
NAMES = ("anna", "ben", "clara", "david", "emma", "felix", "mia", "tom")
COURTESY = ("sure,", "certainly,", "gladly,", "of course,", "with pleasure,")
RUDE = ("silly question,", "listen, fool,", "how boring,", "you are lazy,")
RAMBLE = ("well, there is more to tell.", "and i could go on.", "that reminds me of a story.", "i talk a lot today.")

# Only the pretraining text speaks of these.
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
PLACES = ("market", "harbour", "school", "garden", "station", "library", "bakery", "castle")
WEATHER = ("sunny", "rainy", "windy", "foggy", "snowy", "stormy")
FOODS = ("bread", "cheese", "soup", "honey", "rice", "butter", "salt", "tea")


@dataclass(frozen=True, slots=True)
class Thing:
    """An everyday thing; `traits` are its colour, size, weight and feel."""

    name: str
    kind: str
    traits: tuple[str, ...]


ALL_THINGS = {
    row.split()[0]: Thing(row.split()[0], kind, tuple(row.split()[1:]))
    for kind, rows in _THINGS.items()
    for row in rows.split("|")
}
MEMBERS = {kind: tuple(t.name for t in ALL_THINGS.values() if t.kind == kind) for kind in _THINGS}
TRAITS = tuple(sorted({trait for thing in ALL_THINGS.values() for trait in thing.traits}))
WITH_TRAIT = {trait: tuple(t.name for t in ALL_THINGS.values() if trait in t.traits) for trait in TRAITS}


def a(name: str) -> str:
    """The name with its article."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def listing(names: Sequence[str]) -> str:
    """ "cat, dog and crow"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
