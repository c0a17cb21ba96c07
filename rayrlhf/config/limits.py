"""How large a config may be, and how much of a value a message shows: nothing a person wrote comes near."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rayrlhf.errors import ConfigError

__all__ = ["UNREADABLE", "check_size", "check_text", "leaves", "parse", "shown"]

# ruamel lets a ValueError of a false date or number through, and more where a tag is given what it cannot hold.
UNREADABLE = (YAMLError, ValueError, RecursionError, TypeError, AttributeError, OverflowError, LookupError)
MOST_BYTES = 1 << 20
MOST_VALUES = 100_000
"""with YAML aliases written out: nine lines of them can stand for a billion"""
MOST_LEVELS = 50
"""of sections and lists in each other: what reads or writes them calls itself for each"""

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 300
_SHOWN.maxlong = 80
_SHOWN.maxlist = _SHOWN.maxtuple = _SHOWN.maxdict = 12
_SHOWN.maxlevel = 3


def parse(yaml: YAML, path: Path) -> Any:
    """The file's tree; ConfigError where it is far too large to be a config, or cannot be read at all."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ConfigError(f"{path}: {size} bytes, a config has at most {MOST_BYTES}", "is it a data file?")
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", "check its permissions") from None
    return yaml.load(text.decode("utf-8"))


def check_size(tree: Any, source: str) -> None:
    """Raise ConfigError where the tree holds itself, or stands for more values or is deeper than a config is."""
    found: dict[int, tuple[float, float]] = {}
    values, levels = _extent(tree, found, 1)
    if values > MOST_VALUES:
        raise ConfigError(
            f"{source}: its YAML aliases stand for more than {MOST_VALUES} values, or hold themselves", "write them out"
        )
    if levels > MOST_LEVELS:
        sections = tree.items() if isinstance(tree, Mapping) else ()
        deep = next((f"{key}: " for key, value in sections if _extent(value, found, 2)[1] >= MOST_LEVELS), "")
        raise ConfigError(
            f"{source}: {deep}nested more than {MOST_LEVELS} deep",
            "take sections out, of the file or of an override: the config's own lie 4 deep",
        )


def check_text(tree: Any, source: str) -> None:
    """Raise ConfigError for what cannot be written down again as text."""
    for dotted, _, value in leaves(tree):
        if isinstance(value, bytes):
            raise ConfigError(f"{source}: {dotted}: found bytes, expected text or a number", "take !!binary out")
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"{source}: {dotted}: half a surrogate pair at character {error.start}", "mend or remove it"
                ) from None


def leaves(tree: Any) -> Iterator[tuple[str, str, Any]]:
    """(dotted path, last key, value) of all values; what YAML aliases share is looked at once."""
    return _leaves(tree, "", set(), "")


def shown(value: Any) -> str:
    """Its repr, cut where it is long."""
    try:
        return _SHOWN.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return f"a {type(value).__name__} of thousands of digits"


def _extent(node: Any, found: dict[int, tuple[float, float]], level: int) -> tuple[float, float]:
    """How many values there are below and with `node`, and how many levels; infinity where it is below itself.

    Args:
        found: what is known already, by id: what YAML aliases share is looked at once.
        level: of `node`. Beyond MOST_LEVELS nothing is looked at, and the levels are infinite.
    """
    if not isinstance(node, Mapping | list | tuple | set):
        return 1, 0
    if level > MOST_LEVELS:
        return 1, math.inf
    if id(node) not in found:
        found[id(node)] = math.inf, math.inf  # until it is known: whoever meets it meanwhile is inside of it
        items = [*node, *node.values()] if isinstance(node, Mapping) else node
        extents = [_extent(item, found, level + 1) for item in items]
        found[id(node)] = 1 + sum(values for values, _ in extents), 1 + max((deep for _, deep in extents), default=0)
    return found[id(node)]


def _leaves(node: Any, dotted: str, seen: set[int], key: str) -> Iterator[tuple[str, str, Any]]:
    if not isinstance(node, Mapping | list | tuple | set):
        yield dotted, key, node
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    pairs = node.items() if isinstance(node, Mapping) else ((str(i), item) for i, item in enumerate(node))
    for name, value in pairs:
        here = f"{dotted}.{name}" if dotted else str(name)
        # An item of a list stands under the list's key.
        yield from _leaves(value, here, seen, str(name) if isinstance(node, Mapping) else key)
        if isinstance(name, str):  # keys of the user's own, such as those of ppo.arms
            yield f"a key of {dotted}" if dotted else "a section's name", "", name
