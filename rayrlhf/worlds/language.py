"""A small instruction language about everyday things, and the exact rule that judges a response.

The language is a finite list of tasks (`tasks`); each knows its right answers and some wrong ones, so `gold_score` can
judge any response, also what a trained policy says to a held-out prompt. It asks for what a model of 1-4M parameters
can do: list, name the opposite, judge a property, repeat, sort, read a stated fact. Everything is lower case, about
180 distinct words. "in one word" is asked only where one word can answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

from rayrlhf.errors import DataError

__all__ = ["Task", "Verdict", "gold_score", "tasks", "verdict"]

SHORT_WORDS = 9
"""The longest proper answer is 8 words; anything longer than this rambles."""

# kind: name, colour, size, weight, feel
THINGS = {
    "animal": "cat black small light soft|dog brown small heavy soft|cow white big heavy soft|"
    "crow black small light soft|crab red small light hard",
    "fruit": "apple red small light hard|lemon yellow small light hard|plum blue small light soft|"
    "melon green big heavy hard|banana yellow small light soft",
    "vegetable": "pea green small light soft|beet red small light hard|potato brown small light hard|"
    "cabbage green big heavy hard|turnip white small light hard",
    "tool": "hammer grey small heavy hard|saw grey big light hard|spade brown big heavy hard|"
    "sponge yellow small light soft|brush brown small light soft",
    "garment": "coat blue big heavy soft|sock white small light soft|scarf red big light soft|"
    "boot black small heavy hard|hat grey small light soft",
    "vehicle": "bus red big heavy hard|train green big heavy hard|boat white big heavy hard|"
    "sled brown big light hard|truck yellow big heavy hard",
    "instrument": "drum red big light hard|flute grey small light hard|piano black big heavy hard|"
    "violin brown small light hard|bell yellow small heavy hard",
    "toy": "kite blue big light soft|doll white small light soft|marble green small heavy hard|"
    "balloon red big light soft|block yellow small light hard",
}
COLOURS = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
OPPOSITES = (
    *(("big", "small"), ("heavy", "light"), ("hard", "soft"), ("hot", "cold"), ("fast", "slow"), ("wet", "dry")),
    *(("old", "new"), ("loud", "quiet"), ("full", "empty"), ("clean", "dirty"), ("open", "closed"), ("high", "low")),
)
CONTRAST = dict(OPPOSITES) | {b: a for a, b in OPPOSITES}
NAMES = ("anna", "ben", "clara", "david", "emma", "felix", "mia", "tom")
COURTESY = ("sure,", "certainly,", "gladly,", "of course,", "with pleasure,")
RUDE = ("silly question,", "listen, fool,", "how boring,", "you are lazy,")
RAMBLE = ("well, there is more to tell.", "and i could go on.", "that reminds me of a story.", "i talk a lot today.")
TONES = {"": "", "polite": " politely", "one word": " in one word"}


@dataclass(frozen=True, slots=True)
class Thing:
    """An everyday thing; `traits` are its colour, size, weight and feel."""

    name: str
    kind: str
    traits: tuple[str, ...]


ALL_THINGS = tuple(
    Thing(row.split()[0], kind, tuple(row.split()[1:])) for kind, rows in THINGS.items() for row in rows.split("|")
)


@dataclass(frozen=True, slots=True)
class Task:
    """One instruction with the answers that are right and some that are wrong; tone is a key of `TONES`."""

    kind: str
    prompt: str
    tone: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


# ---- the instruction language


def a(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listing(words: Sequence[str]) -> str:
    """ "cat", "cat and dog", "cat, dog and cow"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def phrased(
    kind: str, order: str, question: str, right: Iterable[str], wrong: Iterable[str], fact: str = ""
) -> Iterator[Task]:
    """The task as an order and as a question, in every tone that it can be answered in."""
    good, bad = tuple(f"{text}." for text in right), tuple(f"{text}." for text in wrong)
    for tone, how in TONES.items():
        if tone == "one word" and not any(is_word(text) for text in good):
            continue
        # A plain yes-or-no question must be answered in a sentence; it says so, and then a bare "yes" is not right.
        sentence = kind == "property" and not tone
        keep = tuple(text for text in good if not (sentence and is_word(text)))
        tail = " in a sentence" if sentence else how
        yield Task(kind, f"{fact}{order}{tail}.", tone, keep, bad)
        yield Task(kind, f"{fact}{question}?" + (f" answer{tail}." if tail else ""), tone, keep, bad)


def list_tasks() -> Iterator[Task]:
    """ "name 2 animals": any distinct members in any order; wrong is a stranger among them or one too many or few."""
    rng = random.Random("list")
    for kind in THINGS:
        members = [thing.name for thing in ALL_THINGS if thing.kind == kind]
        others = [thing.name for thing in ALL_THINGS if thing.kind != kind]
        for n in range(1, 5):
            what = f"{n} {kind}{'s' if n > 1 else ''}"
            wrong = []
            for number, other in enumerate(others):
                names = rng.sample(members, n - 1)
                names.insert(number % n, other)
                wrong.append(listing(names))
            wrong += [listing(names) for names in permutations(members[:4], n - 1 if n > 2 else n + 1)]
            right = map(listing, permutations(members, n))
            yield from phrased("list", f"name {what}", f"can you name {what}", right, wrong)


def opposite_tasks() -> Iterator[Task]:
    """ "name the opposite of hot": wrong is any other adjective, the word itself included."""
    for word, other in CONTRAST.items():
        said = f"the opposite of {word} is"
        wrong = [form for bad in CONTRAST if bad != other for form in (bad, f"{said} {bad}")]
        stem = f"the opposite of {word}"
        yield from phrased("opposite", f"name {stem}", f"what is {stem}", [other, f"{said} {other}"], wrong)


def property_tasks() -> Iterator[Task]:
    """ "is a lemon sour": each thing is asked for its traits, their opposites and one colour that it lacks."""
    for number, thing in enumerate(ALL_THINGS):
        lacking = [colour for colour in COLOURS if colour != thing.traits[0]]
        asked = [*thing.traits, *(CONTRAST[trait] for trait in thing.traits[1:]), lacking[number % len(lacking)]]
        for trait in asked:
            yes = ("yes", f"yes, {a(thing.name)} is {trait}")
            no = ("no", f"no, {a(thing.name)} is not {trait}")
            right, wrong = (yes, no) if trait in thing.traits else (no, yes)
            question = f"is {a(thing.name)} {trait}"
            yield from phrased("property", f"say whether {a(thing.name)} is {trait}", question, right, wrong)


def repeat_tasks() -> Iterator[Task]:
    """ "say drum 3 times": wrong is once more, once less, or another word."""
    for thing in ALL_THINGS:
        for n in range(2, 6):
            times = {count: " ".join([thing.name] * count) for count in (n - 1, n, n + 1)}
            wrong = [times[n - 1], times[n + 1], " ".join([thing.kind] * n)]
            question = f"can you repeat the word {thing.name} {n} times"
            yield from phrased("repeat", f"say {thing.name} {n} times", question, [times[n]], wrong)


def sort_tasks() -> Iterator[Task]:
    """ "sort 7, 2, 9": ascending; a fixed sample, since all orders of 12 numbers would swamp the world."""
    for numbers in random.Random("sort").sample(list(permutations(range(1, 13), 3)), 300):
        right, *wrong = (", ".join(map(str, order)) for order in permutations(sorted(numbers)))
        given = ", ".join(map(str, numbers))
        yield from phrased("sort", f"sort {given}", f"what is the right order of {given}", [right], wrong)


def fact_tasks() -> Iterator[Task]:
    """ "mia has a drum and tom has a kite. what does tom have?": wrong is what the other one has, or neither."""
    rng = random.Random("fact")
    for _ in range(300):
        (one, two), (x, y, z) = rng.sample(NAMES, 2), (thing.name for thing in rng.sample(ALL_THINGS, 3))
        fact = f"{one} has {a(x)} and {two} has {a(y)}. "
        who, has, has_not = (one, x, (y, z)) if rng.random() < 0.5 else (two, y, (x, z))
        right = [has, f"{who} has {a(has)}"]
        wrong = [form for bad in has_not for form in (bad, f"{who} has {a(bad)}")]
        yield from phrased("fact", f"say what {who} has", f"what does {who} have", right, wrong, fact)


@lru_cache(maxsize=1)
def tasks() -> tuple[Task, ...]:
    """Every task of the world, each prompt once; the same whatever the seed, so any prompt can be judged later."""
    makers = (list_tasks, opposite_tasks, property_tasks, repeat_tasks, sort_tasks, fact_tasks)
    return tuple({task.prompt: task for maker in makers for task in maker()}.values())


# ---- the rule


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule looks at."""

    right: bool
    tone: bool
    short: bool
    rude: bool

    @property
    def points(self) -> int:
        """In tenths, so that equal verdicts tie exactly; content outweighs all the rest together."""
        return 6 * self.right + 2 * self.tone + 2 * self.short - 2 * self.rude


def words(text: str) -> str:
    """Lower-case words between single spaces, a space at each end; punctuation is not judged."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def is_word(text: str) -> bool:
    """Is the text exactly one word?"""
    return len(words(text).split()) == 1


def content(text: str) -> str:
    """The words that carry an answer: "and" only joins them."""
    return words(text).replace(" and ", " ")


def without(text: str, phrases: Iterable[str]) -> tuple[str, bool]:
    """The text with the stock phrases taken out, and whether there were any."""
    left = text
    for phrase in phrases:
        left = left.replace(words(phrase), " ")
    return left, left != text


def verdict(task: Task, response: str) -> Verdict:
    """Judge a response by its words alone."""
    core, rambles = without(words(response), RAMBLE)
    core, rude = without(core, RUDE)
    core, courteous = without(core, COURTESY)
    tone = not rude
    if task.tone == "polite":
        tone = courteous and not rude
    elif task.tone == "one word":
        tone = is_word(response)
    short = not rambles and len(words(response).split()) <= SHORT_WORDS
    return Verdict(content(core) in {content(answer) for answer in task.right}, tone, short, rude)


@lru_cache(maxsize=1)
def by_prompt() -> dict[str, Task]:
    """The index behind `gold_score`."""
    return {task.prompt: task for task in tasks()}


def gold_score(prompt: str, response: str) -> float:
    """The exact quality of a response, at most 1: .6 right, .2 in the tone asked for, .2 short, -.2 rude."""
    if prompt not in by_prompt():
        raise DataError(f"not a prompt of the starter world: {prompt!r}", "score prompts that write_starter wrote")
    return verdict(by_prompt()[prompt], response).points / 10
