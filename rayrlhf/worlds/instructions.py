"""The built-in world: a small language of instructions about everyday things, with an exact judge.

    Task = what is asked (a Kind and its arguments) x wording (order or question) x manner (politely, in one word, ...)

What is judged: is the answer right, in the manner asked for, ended, concise, civil. A model of about a million
parameters can learn most of it in minutes, and far from all of it.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

from rayrlhf.errors import DataError
from rayrlhf.worlds.base import Choice, Sizes, World, register_world
from rayrlhf.worlds.kinds import KINDS, Args, Kind, content
from rayrlhf.worlds.texts import about_opposites, about_things, about_town, question, story
from rayrlhf.worlds.words import COURTESY, RAMBLE, RUDE

__all__ = ["MANNERS", "OPENERS", "Instructions", "Task", "respond"]

MANNERS = ("", "politely", "in one word", "in a sentence", "in at most 5 words", "politely in a sentence")
OPENERS = {"order": ("", "please ", "now "), "question": ("", "tell me, ", "so ")}
MOST_WORDS = 12
"""The longest proper answer has 11 words; anything longer than this is not concise."""
HELD_OUT_SHARE = 8
"""One combination in so many is held out."""


@dataclass(frozen=True)
class Task:
    """One instruction."""

    kind: Kind
    args: Args
    manner: str
    wording: str
    """a key of `OPENERS`"""
    opener: str

    @cached_property
    def prompt(self) -> str:
        fact, tail = self.kind.fact.format(**self.args), f" {self.manner}" if self.manner else ""
        if self.wording == "question":
            answer = f" answer{tail}." if tail else ""
            return f"{fact}{self.opener}{self.kind.question.format(**self.args)}?{answer}"
        return f"{fact}{self.opener}{self.kind.order.format(**self.args)}{tail}."

    @cached_property
    def held_out(self) -> bool:
        """By what is combined, not by the words."""
        return zlib.crc32(" ".join(self.combination).encode()) % HELD_OUT_SHARE == 0

    @property
    def combination(self) -> tuple[str, ...]:
        """The kind and its arguments; with its manner too where arguments are few."""
        parts = (self.kind.name, *self.kind.combination(self.args))
        return (*parts, self.manner) if self.kind.few else parts

    def sentence(self, answer: str) -> str:
        """The answer in a sentence, where the kind has one."""
        return self.kind.frame.format(answer=answer, **self.args)


def manners(kind: Kind, args: Args) -> list[str]:
    """Those in which this can be answered."""
    longest = len(content(kind.right(random.Random(0), args))) + 2  # an article, an "and"
    fits = {
        "in one word": kind.one_word,
        "in a sentence": bool(kind.frame),
        "politely in a sentence": bool(kind.frame),
        "in at most 5 words": longest <= 5,
    }
    return [manner for manner in MANNERS if fits.get(manner, True)]


def draw(rng: random.Random, held_out: bool | None = None, plain: float = 0.0, practice: bool = False) -> Task:
    """A task of any kind, each as likely; held out or not, or (None) either.

    Args:
        plain: share that asks for no manner.
        practice: hard kinds twice as often.
    """
    kinds = tuple(KINDS.values())
    kind = rng.choices(kinds, [2 if practice and kind.hard else 1 for kind in kinds])[0]
    while True:
        args = kind.draw(rng)
        manner = "" if rng.random() < plain else rng.choice(manners(kind, args))
        wording = rng.choice(tuple(OPENERS))
        task = Task(kind, args, manner, wording, rng.choice(OPENERS[wording]))
        if held_out is None or task.held_out == held_out:
            return task


@lru_cache(maxsize=65536)
def read(prompt: str) -> Task:
    """The task that a prompt asks for.

    Raises:
        DataError: it is not of this language.
    """
    wording = "question" if "?" in prompt else "order"
    for manner in sorted(MANNERS, key=len, reverse=True):
        tail = f" {manner}" if manner else ""
        end = (f"? answer{tail}." if tail else "?") if wording == "question" else f"{tail}."
        for opener in OPENERS[wording] if prompt.endswith(end) else ():
            for kind in KINDS.values():
                if (args := kind.read(prompt[: -len(end)], f"{opener}{getattr(kind, wording)}")) is not None:
                    return Task(kind, args, manner, wording, opener)
    raise DataError(f"not an instruction of this world: {prompt!r}", "judge prompts that the world wrote")


def respond(rng: random.Random, task: Task, right: bool = True, deaf: bool = False, rude: bool = False,
            rambling: bool = False) -> str:  # fmt: skip
    """A response of the given quality; `deaf` is deaf to the manner asked for."""
    answer = (task.kind.right if right else task.kind.wrong)(rng, task.args)
    wants_sentence, wants_few = "sentence" in task.manner, "word" in task.manner
    whole = bool(task.kind.frame) and rng.random() < 0.5
    if wants_sentence or wants_few:
        whole = wants_sentence != deaf and bool(task.kind.frame)
    if task.manner == "in one word" and not whole:
        answer = " ".join(content(answer))
    parts = [f"{task.sentence(answer) if whole else answer}."]
    if rude:
        parts.insert(0, rng.choice(RUDE))
    elif "politely" in task.manner and not deaf:
        parts.insert(0, rng.choice(COURTESY))
    if rambling:
        parts += rng.sample(RAMBLE, rng.choice((1, 1, 3)))
    return " ".join(parts)


def without(words: str, phrases: Iterable[str]) -> tuple[str, bool]:
    """The spaced words with the stock phrases taken out, and whether there were any."""
    left = words
    for phrase in phrases:
        left = left.replace(_spaced(phrase), " ")
    return left, left != words


def _spaced(text: str) -> str:
    """Lower-case words between single spaces, one at each end; punctuation is not judged."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


@register_world("instructions")
class Instructions(World):
    """Eight kinds of instruction in six manners."""

    sizes = Sizes(
        text=33_000,
        demonstrations=3000,
        rankings=2000,
        heldout_rankings=300,
        ranking_prompts=3000,
        prompts=5000,
        heldout_prompts=600,
        multiple_choice=400,
    )
    weights: ClassVar = {"right": 0.5, "manner": 0.15, "ends": 0.1, "concise": 0.1, "civil": 0.15}

    def document(self, rng: random.Random) -> str:
        """Mostly exercises; else plain statements, or what no instruction touches: a story, or the town.

        The exercises are in the very wording of the instructions, and all are answered rightly: a reward model can only
        prefer right content if pretraining taught it what is right. Wrong answers, marked as such, teach a model of
        this size less: it learns to give them.
        """
        chance = rng.random()
        if chance < 0.76:
            tasks = (draw(rng, held_out=False, plain=0.5, practice=True) for _ in range(3))
            return "\n".join(f"{task.prompt}\n{respond(rng, task, rude=rng.random() < 0.03)}" for task in tasks)
        if chance < 0.86:
            return rng.choice((about_things, about_things, about_opposites))(rng)
        return (story if chance < 0.93 else about_town)(rng)

    def prompt(self, rng: random.Random, heldout: bool) -> str:
        return draw(rng, heldout).prompt

    def demonstration(self, rng: random.Random, prompt: str) -> tuple[str, str]:
        """One of four contractors: one is careful, the others have bad habits; flaws come alone or together."""
        name, habit = rng.choice((("careful", None), ("hasty", "deaf"), ("gruff", "rude"), ("chatty", "rambling")))
        chances = {flaw: 0.75 if flaw == habit else 0.25 if habit else 0.05 for flaw in ("deaf", "rude", "rambling")}
        right = rng.random() >= (0.12 if habit else 0.05)
        flaws = {flaw: rng.random() < chance for flaw, chance in chances.items()}
        return respond(rng, read(prompt), right, **flaws), name

    def flags(self, prompt: str, response: str, finished: bool) -> dict[str, bool]:
        task = read(prompt)
        words = _spaced(response)
        core, rambles = without(words, RAMBLE)
        core, rude = without(core, RUDE)
        core, courteous = without(core, COURTESY)
        right, whole = self._answer(task, core)
        total = len(words.split())
        manner = {
            "politely": courteous,
            "in one word": total == 1,
            "in a sentence": whole,
            "in at most 5 words": 0 < total <= 5,
            "politely in a sentence": courteous and whole,
        }.get(task.manner, True)
        return {
            "right": right,
            "manner": manner,
            "ends": finished and response.rstrip().endswith("."),
            "concise": not rambles and 0 < total <= MOST_WORDS,
            "civil": not rude,
        }

    def cloze(self, rng: random.Random) -> Choice | None:
        return question(rng)

    def kind(self, prompt: str) -> str:
        return read(prompt).kind.name

    def _answer(self, task: Task, core: str) -> tuple[bool, bool]:
        """(is the content right, is it a sentence)."""
        words = content(core)
        if task.kind.frame:
            before, after = (content(part) for part in task.sentence("@").split("@"))
            inner = words[len(before) : len(words) - len(after)]
            if inner and before + inner + after == words:
                return task.kind.accepts(task.args, inner), True
        return task.kind.accepts(task.args, words), False
