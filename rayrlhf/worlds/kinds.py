"""The kinds of instruction: how each is worded, what answers it rightly, and what almost does.

A `Kind` knows its wording as templates, so a prompt can be written from its arguments and read back from its words.
Answers are compared as words, without articles and without the "and" of a list.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import ClassVar

from rayrlhf.worlds.words import (
    ALL_THINGS,
    MEMBERS,
    NAMES,
    OPPOSITE,
    SITES,
    WITH_TRAIT,
    a,
    listing,
)

__all__ = ["KINDS", "Args", "Kind", "content"]

Args = dict[str, str]
_ASKED = {"who has it": "who", "where it is": "place", "what it is": "x"}
_SLOTS = {
    "items": r"[a-z, ]+",
    "numbers": r"[\d, ]+",
    "x": r"an? [a-z]+",
    "place": r"[io]n the [a-z]+",
    "asked": "|".join(_ASKED),
}
_THINGS = tuple(ALL_THINGS)
_SAYABLE = (*_THINGS, *OPPOSITE)


def content(text: str) -> list[str]:
    """The words that carry an answer: lower case, no punctuation, no articles, no "and"."""
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in ("a", "an", "the", "and")]


class Kind(ABC):
    """One kind of instruction; its arguments are words by slot."""

    name: ClassVar[str]
    fact: ClassVar[str] = ""
    """Stated before the instruction."""
    order: ClassVar[str]
    question: ClassVar[str]
    frame: ClassVar[str] = ""
    """The answer in a sentence; empty where there is none."""
    one_word: ClassVar[bool] = False
    """Whether one word can answer."""
    few: ClassVar[bool] = False
    """Whether there are only some dozens of arguments."""
    hard: ClassVar[bool] = False
    """Whether a small model learns it late: pretraining text has it twice as often."""

    @abstractmethod
    def draw(self, rng: random.Random) -> Args: ...

    @abstractmethod
    def combination(self, args: Args) -> tuple[str, ...]:
        """What is combined: those held out occur in no training prompt, whatever its wording."""

    @abstractmethod
    def right(self, rng: random.Random, args: Args) -> str:
        """A short right answer."""

    @abstractmethod
    def wrong(self, rng: random.Random, args: Args) -> str:
        """A short answer that is wrong, but of the right sort."""

    def accepts(self, args: Args, words: Sequence[str]) -> bool:
        """Whether these words (`content` of an answer) are a right short answer; by default there is only one."""
        return list(words) == content(self.right(random.Random(0), args))

    def read(self, text: str, wording: str) -> Args | None:
        """The arguments of a prompt without its manner and final mark; None where it is worded in another way."""
        match = _pattern(f"{self.fact}{wording}").fullmatch(text)
        return match.groupdict() if match else None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    def slot(match: re.Match[str]) -> str:
        name = match[1]
        return f"(?P<{name}>{_SLOTS.get(name, '[a-z0-9]+')})"

    # A slot that comes twice must hold the same words twice; no template needs that.
    return re.compile(re.sub(r"\\{(\w+)\\}", slot, re.escape(template)))


class Listing(Kind):
    """ "name 2 animals": distinct members, in any order."""

    name, order, question = "list", "name {n} {kinds}", "can you name {n} {kinds}"
    frame, few, hard = "{answer} are {kinds}", True, True

    def draw(self, rng: random.Random) -> Args:
        return {"n": str(rng.randint(2, 4)), "kinds": f"{rng.choice(tuple(MEMBERS))}s"}

    def combination(self, args: Args) -> tuple[str, ...]:
        return args["n"], args["kinds"]

    def right(self, rng: random.Random, args: Args) -> str:
        return listing(rng.sample(MEMBERS[args["kinds"][:-1]], int(args["n"])))

    def wrong(self, rng: random.Random, args: Args) -> str:
        members, n = MEMBERS[args["kinds"][:-1]], int(args["n"])
        if rng.random() < 0.5:
            return listing(rng.sample(members, n + 1 if n == 2 or rng.random() < 0.5 else n - 1))
        strangers = [name for name in _THINGS if name not in members]
        names = [*rng.sample(members, n - 1), rng.choice(strangers)]
        rng.shuffle(names)
        return listing(names)

    def accepts(self, args: Args, words: Sequence[str]) -> bool:
        return len(words) == int(args["n"]) == len(set(words)) and set(words) <= set(MEMBERS[args["kinds"][:-1]])


class Filter(Kind):
    """ "name one red fruit": any member with the trait."""

    name, order, question = "filter", "name one {trait} {kind}", "which {kind} is {trait}"
    frame, one_word, few, hard = "{answer} is {trait}", True, True, True

    def draw(self, rng: random.Random) -> Args:
        thing = ALL_THINGS[rng.choice(_THINGS)]
        return {"trait": rng.choice(thing.traits), "kind": thing.kind}

    def combination(self, args: Args) -> tuple[str, ...]:
        return args["trait"], args["kind"]

    def right(self, rng: random.Random, args: Args) -> str:
        return a(rng.choice([name for name in MEMBERS[args["kind"]] if args["trait"] in ALL_THINGS[name].traits]))

    def wrong(self, rng: random.Random, args: Args) -> str:
        strangers = [n for n in WITH_TRAIT[args["trait"]] if ALL_THINGS[n].kind != args["kind"]]
        lacking = [n for n in MEMBERS[args["kind"]] if args["trait"] not in ALL_THINGS[n].traits]
        return a(rng.choice(lacking if lacking and rng.random() < 0.5 else strangers))

    def accepts(self, args: Args, words: Sequence[str]) -> bool:
        return len(words) == 1 and words[0] in MEMBERS[args["kind"]] and args["trait"] in ALL_THINGS[words[0]].traits


class Opposite(Kind):
    """ "name the opposite of hot"."""

    name, order, question = "opposite", "name the opposite of {word}", "what is the opposite of {word}"
    frame, one_word, few = "the opposite of {word} is {answer}", True, True

    def draw(self, rng: random.Random) -> Args:
        return {"word": rng.choice(tuple(OPPOSITE))}

    def combination(self, args: Args) -> tuple[str, ...]:
        return (args["word"],)

    def right(self, rng: random.Random, args: Args) -> str:
        return OPPOSITE[args["word"]]

    def wrong(self, rng: random.Random, args: Args) -> str:
        return rng.choice([word for word in OPPOSITE if word != OPPOSITE[args["word"]]])


class Repeat(Kind):
    """ "say drum 3 times"."""

    name, order, question = "repeat", "say {word} {n} times", "can you say {word} {n} times"

    def draw(self, rng: random.Random) -> Args:
        return {"word": rng.choice(_SAYABLE), "n": str(rng.randint(2, 5))}

    def combination(self, args: Args) -> tuple[str, ...]:
        return args["word"], args["n"]

    def right(self, rng: random.Random, args: Args) -> str:
        return " ".join([self.said(args)] * int(args["n"]))

    def wrong(self, rng: random.Random, args: Args) -> str:
        if rng.random() < 0.25:
            return " ".join([rng.choice([w for w in _SAYABLE if w != self.said(args)])] * int(args["n"]))
        return " ".join([self.said(args)] * (int(args["n"]) + rng.choice((-1, 1))))

    def said(self, args: Args) -> str:
        return args["word"]


class Echo(Repeat):
    """ "say the opposite of hot 3 times"."""

    name = "echo"
    order, question = "say the opposite of {word} {n} times", "can you say the opposite of {word} {n} times"

    def draw(self, rng: random.Random) -> Args:
        return {"word": rng.choice(tuple(OPPOSITE)), "n": str(rng.randint(2, 5))}

    def said(self, args: Args) -> str:
        return OPPOSITE[args["word"]]


class Sort(Kind):
    """ "sort 7, 2, 9": upwards."""

    name, order, question = "sort", "sort {numbers}", "what is the order of {numbers}"
    frame, hard = "the order is {answer}", True

    def draw(self, rng: random.Random) -> Args:
        return {"numbers": ", ".join(map(str, rng.sample(range(1, 13), 3)))}

    def combination(self, args: Args) -> tuple[str, ...]:
        return tuple(sorted(args["numbers"].split(", "), key=int))

    def right(self, rng: random.Random, args: Args) -> str:
        return ", ".join(sorted(args["numbers"].split(", "), key=int))

    def wrong(self, rng: random.Random, args: Args) -> str:
        right, numbers = self.right(rng, args), args["numbers"].split(", ")
        while (given := ", ".join(numbers)) == right:
            rng.shuffle(numbers)
        return given


class Count(Kind):
    """ "count cat, drum, dog"."""

    name, order, question = "count", "count {items}", "how many are {items}"
    frame = "there are {answer}"

    def draw(self, rng: random.Random) -> Args:
        return {"items": ", ".join(rng.sample(_THINGS, rng.randint(2, 5)))}

    def combination(self, args: Args) -> tuple[str, ...]:
        return tuple(sorted(args["items"].split(", ")))

    def right(self, rng: random.Random, args: Args) -> str:
        return f"{args['items'].count(',') + 1} things"

    def wrong(self, rng: random.Random, args: Args) -> str:
        return f"{rng.choice([n for n in range(2, 6) if n != args['items'].count(',') + 1])} things"


class Fact(Kind):
    """ "anna has a drum on the shelf. say where it is."."""

    name, fact = "fact", "{who} has {x} {place}. "
    order, question = "say {asked}", "can you say {asked}"
    hard = True

    def draw(self, rng: random.Random) -> Args:
        who, x, place = rng.choice(NAMES), a(rng.choice(_THINGS)), rng.choice(SITES)
        return {"who": who, "x": x, "place": place, "asked": rng.choice(tuple(_ASKED))}

    def combination(self, args: Args) -> tuple[str, ...]:
        return args["who"], args["x"], args["place"]

    def right(self, rng: random.Random, args: Args) -> str:
        return args[_ASKED[args["asked"]]]

    def wrong(self, rng: random.Random, args: Args) -> str:
        """Something else that was stated, or the same sort of thing that was not."""
        right = self.right(rng, args)
        if rng.random() < 0.3:
            return rng.choice([args[slot] for slot in _ASKED.values() if args[slot] != right])
        strangers = {"who": NAMES, "place": SITES, "x": tuple(map(a, _THINGS))}[_ASKED[args["asked"]]]
        return rng.choice([stranger for stranger in strangers if stranger != right])


_ALL: tuple[Kind, ...] = (*(Listing(), Filter(), Opposite(), Repeat(), Echo(), Sort(), Count(), Fact()),)
KINDS = {kind.name: kind for kind in _ALL}
