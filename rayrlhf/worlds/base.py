"""What a world is: instructions that a program can write, answer and judge exactly. And the register of all worlds.

A world replaces people and data collection: it writes pretraining text, instructions and flawed demonstrations, and
its `flags` are the exact truth about a response. Simulated labelers (labelers.py) see those flags through noise and
tastes of their own; no model is ever trained on the flags themselves. So a policy's true quality is known exactly,
which no reward model can say of itself.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from rayrlhf.config.modules import import_named
from rayrlhf.errors import ConfigError

__all__ = ["Choice", "Sizes", "World", "create_world", "register_world"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A cloze or multiple-choice question: which of `choices` goes on from `prompt`; `answer` is its number."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many records a world writes of each kind, by their key in `data`."""

    text: int
    demonstrations: int
    rankings: int
    heldout_rankings: int
    ranking_prompts: int
    prompts: int
    heldout_prompts: int
    multiple_choice: int = 0


class World(ABC):
    """Everything random comes from the `rng` that is passed, so a seed gives the same world again."""

    sizes: ClassVar[Sizes]
    weights: ClassVar[Mapping[str, float]]
    """For each flag what it is worth to a reader; together 1."""

    @abstractmethod
    def document(self, rng: random.Random) -> str:
        """A document of pretraining text; none of a held-out prompt's combination."""

    @abstractmethod
    def prompt(self, rng: random.Random, heldout: bool) -> str:
        """An instruction; those held out combine things in ways that no other file does."""

    @abstractmethod
    def demonstration(self, rng: random.Random, prompt: str) -> tuple[str, str]:
        """(what a contractor answers, who it was); flawed as people's answers are."""

    @abstractmethod
    def flags(self, prompt: str, response: str, finished: bool) -> dict[str, bool]:
        """The exact truth about any response, a key for each of `weights`; True is good.

        Args:
            finished: whether the response ended by itself, with the EOS, before the limit.
        """

    def cloze(self, rng: random.Random) -> Choice | None:
        """A question about what only the pretraining text teaches."""
        return None

    def kind(self, prompt: str) -> str:
        """What sort of instruction it is, for reports by kind."""
        return ""

    def gold(self, prompt: str, response: str, finished: bool = True) -> float:
        """The gold score, in [0, 1]: the sum of the weights of the flags that hold."""
        held = self.flags(prompt, response, finished)
        return sum(weight for flag, weight in self.weights.items() if held[flag])


_WORLDS: dict[str, type[World]] = {}
W = TypeVar("W", bound=type[World])


def register_world(name: str) -> Callable[[W], W]:
    """Class decorator: `world.name: <name>` then means this world."""

    def register(world: W) -> W:
        _WORLDS[name] = world
        return world

    return register


def create_world(name: str, module: str | None = None) -> World:
    """The world called `name`; `module`, a .py file or an importable module, is imported first and may register it.

    Raises:
        ConfigError: no such world, module or file; the module cannot be imported, or the world cannot be made.
    """
    import rayrlhf.worlds.instructions  # noqa: F401 (registers itself)

    if module is not None:
        import_named(module, "world.module", "world", "name a .py file, or an importable module")
    if name not in _WORLDS:
        where = f" in {module}" if module else "; a world of your own needs world.module"
        raise ConfigError(f"world.name: no world {name!r}", f"known are {', '.join(sorted(_WORLDS))}{where}")
    world = _WORLDS[name]
    try:
        made = world()
    except Exception as error:  # somebody's own class: anything may go wrong in it
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"world.name: {name!r} ({world.__qualname__}) cannot be made: {reason}", "mend it") from error
    for attribute in ("sizes", "weights"):
        if not hasattr(made, attribute):
            raise ConfigError(f"world.name: {name!r} ({world.__qualname__}) has no `{attribute}`", "see docs/worlds.md")
    if not made.weights or min(made.weights.values()) < 0 or abs(sum(made.weights.values()) - 1) > 1e-6:
        found = ", ".join(f"{flag} {weight:g}" for flag, weight in made.weights.items())
        message = f"world.name: the weights of {name!r} ({found}) are not shares of 1, so gold is no score from 0 to 1"
        raise ConfigError(message, "divide each by their sum")
    return made
