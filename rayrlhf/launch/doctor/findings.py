"""What a check says, and how the answers of many nodes become one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, NamedTuple, TypeVar

__all__ = ["Answers", "Finding", "Status", "Verdict", "over_nodes", "passed", "skipped"]

Status = Literal["pass", "skipped", "warn", "fail"]
SEVERITY: tuple[Status, ...] = ("skipped", "pass", "warn", "fail")
# Nodes, or groups of them, that a finding tells apart; a cluster of hundreds must not fill the screen.
TOLD = 8
UNANSWERED = "see whether the node is up (`ray status`) and has this release installed; then its raylet's log"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    status: Status
    found: str
    cure: str = ""
    """what to do, where something is to be done"""
    figures: Mapping[str, float] = field(default_factory=dict)
    """what was measured, for programs; the worst of the nodes"""


class Verdict(NamedTuple):
    """On one node."""

    status: Status
    found: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Answers(Generic[T]):
    """What was asked of every node, by the node's name."""

    given: Mapping[str, T]
    failed: Mapping[str, str] = field(default_factory=dict)
    """why there is no answer"""


def passed(found: str) -> Verdict:
    return Verdict("pass", found)


def skipped(name: str, why: str) -> Finding:
    return Finding(name, "skipped", why)


def over_nodes(
    name: str,
    answers: Answers[T],
    judge: Callable[[str, T], Verdict],
    figures: Mapping[str, float] | None = None,
) -> Finding:
    """The worst verdict counts; nodes of which the same is to be said are named together, good ones only if all are.

    Args:
        judge: a node's name and what it answered -> what that is worth.
    """
    verdicts = {node: judge(node, answer) for node, answer in answers.given.items()}
    verdicts |= {node: Verdict("fail", why, UNANSWERED) for node, why in answers.failed.items()}
    status: Status = max((v.status for v in verdicts.values()), key=SEVERITY.index, default=SEVERITY[0])
    told = {node: v for node, v in verdicts.items() if status in ("pass", "skipped") or v.status in ("warn", "fail")}
    cures = dict.fromkeys(v.cure for v in told.values() if v.cure and v.status == status)
    alone = len(verdicts) == 1 and not answers.failed
    found = next(iter(verdicts.values())).found if alone else _told(told, len(verdicts))
    return Finding(name, status, found, "; ".join(cures), figures or {})


def _told(verdicts: Mapping[str, Verdict], nodes: int) -> str:
    groups: dict[str, list[str]] = {}
    for node, verdict in verdicts.items():
        groups.setdefault(verdict.found, []).append(node)
    if len(groups) == 1 and len(verdicts) == nodes > 1:
        return f"all {nodes} nodes: {next(iter(groups))}"
    lines = [f"{_listed(names)}: {found}" for found, names in groups.items()]
    more = [f"and {len(lines) - TOLD} more"] if len(lines) > TOLD else []
    return "; ".join([*lines[:TOLD], *more])


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - TOLD} more" if len(every) > TOLD else ""
    return ", ".join(every[:TOLD]) + more
