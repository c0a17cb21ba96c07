"""What would make a config fit: keys to change, the cheapest first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rayrlhf.config import Config, config_from
from rayrlhf.errors import ConfigError, ResourceError
from rayrlhf.planning.changes import Change, changes
from rayrlhf.planning.plan import Plan

__all__ = ["Remedy", "check_fits", "remedies"]

SHOWN = 3
# Keys that are changed together at most, and plans that are made at most: some seconds.
TOGETHER, TRIES = 3, 600
Planner = Callable[[Config], Plan]


@dataclass(frozen=True, slots=True)
class Remedy:
    overrides: tuple[str, ...]
    plan: Plan


def check_fits(config: Config, plan: Plan, planned: Planner) -> None:
    """Raise ResourceError where `plan`, of `config`, does not fit; it names roles, GiB over, and what would help.

    Args:
        planned: plans another config on the same hardware.
    """
    if plan.fits:
        return
    message = "; ".join(shortfall.message for shortfall in plan.shortfalls)
    found = remedies(config, plan, planned)
    hint = "\n    ".join(_words(remedy, plan) for remedy in found)
    raise ResourceError(
        f"this does not fit: {message}",
        f"any of these would do:\n    {hint}" if found else "take a smaller model, or more of the hardware",
    )


def remedies(config: Config, plan: Plan, planned: Planner) -> list[Remedy]:
    """Up to three ways to make it fit: single changes before pairs and triples, and of those the cheapest first."""
    tries = itertools.count()

    def attempt(keys: tuple[str, ...]) -> Plan | None:
        if next(tries) >= TRIES:
            return None
        try:
            return planned(config_from(config.model_dump(mode="json"), keys, {}))
        except ConfigError:  # keys that contradict each other, or others
            return None

    found, spare = dict[frozenset[str], Remedy](), list[Remedy]()
    possible = changes(config, plan)
    for size in range(1, TOGETHER + 1):
        for parts in _combined(possible, size):
            remedy = _least(parts, attempt)
            if remedy is None or any(set(known.overrides) < set(remedy.overrides) for known in found.values()):
                continue  # of the latter fewer changes would do
            names = frozenset(key.partition("=")[0] for key in remedy.overrides)
            if names in found:  # the dearer one is shown where there are too few of other keys
                remedy, dearer = sorted((remedy, found[names]), key=lambda either: _cost(either.plan))
                spare.append(dearer)
            found[names] = remedy
        if len(found) >= SHOWN:
            break
        if size == 1:
            # What alone leaves least is tried with others first: tries may run out. What alone leaves all may still
            # help beside another: the fullest moment hides the one behind it.
            left = {change: _left(plan, attempt(change.steps[-1])) for change in possible}
            possible = sorted(possible, key=lambda change: left[change])
    first = sorted(found.values(), key=lambda remedy: _cost(remedy.plan))[:SHOWN]
    more = sorted(spare, key=lambda remedy: _cost(remedy.plan))[: SHOWN - len(first)]
    return sorted([*first, *more], key=lambda remedy: _cost(remedy.plan))


def _combined(possible: Sequence[Change], size: int) -> Iterator[tuple[Change, ...]]:
    """Changes of different keys."""
    for parts in itertools.combinations(possible, size):
        if len(frozenset[str]().union(*(part.names for part in parts))) == sum(len(part.names) for part in parts):
            yield parts


def _least(parts: Sequence[Change], attempt: Callable[[tuple[str, ...]], Plan | None]) -> Remedy | None:
    """With as little of each as still fits: all are changed as far as they go, and then each is taken back."""
    chosen = [len(part.steps) - 1 for part in parts]

    def made() -> Remedy | None:
        keys = tuple(itertools.chain(*(part.steps[at] for part, at in zip(parts, chosen, strict=True))))
        other = attempt(keys)
        return Remedy(keys, other) if other and other.fits else None

    best = made()
    if best is None:
        return None
    for number in range(len(parts)):
        low, high = 0, chosen[number]
        while low < high:
            chosen[number] = (low + high) // 2
            if remedy := made():
                best, high = remedy, chosen[number]
            else:
                low = chosen[number] + 1
        chosen[number] = high
    return best


def _left(before: Plan, after: Plan | None) -> float:
    """What still lacks room: of each of the shortfalls the share, at most 1."""
    if after is None:  # alone it contradicts other keys; with others it may not
        return len(before.shortfalls) - 0.5
    left = {short.roles: short.over for short in after.shortfalls}
    return sum(min(1.0, left.get(short.roles, 0.0) / short.over) for short in before.shortfalls)


def _cost(plan: Plan) -> float:
    return plan.time.seconds * (plan.devices if plan.work.gpu else 1.0)


def _words(remedy: Remedy, before: Plan) -> str:
    more = _cost(remedy.plan) / _cost(before) - 1
    what = "GPU-seconds" if before.work.gpu else "seconds"
    return f"{' '.join(remedy.overrides)} ({more:+.0%} {what} a step)"
