"""How many nodes a run needs: the bundles of its placement groups, put on nodes as large first as first fit. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rayrlhf.actors.placement import RolePlacement, plans, shared_bundles
from rayrlhf.config import Config
from rayrlhf.errors import ConfigError
from rayrlhf.launch.values import WorkerGroup

__all__ = ["nodes_needed"]

Bundle = Mapping[str, float]
SLACK = 1e-6


class _Nodes:
    """Nodes taken so far, and what is left of each."""

    def __init__(self, groups: Mapping[str, WorkerGroup]) -> None:
        self._groups = groups
        self._left: list[tuple[str, dict[str, float]]] = []

    def place(self, role: str, bundle: Bundle, without: Sequence[int] = ()) -> int:
        """On the first node with room, or on a new one. Returns its number."""
        for number, (_, left) in enumerate(self._left):
            if number not in without and _fits(bundle, left):
                _take(bundle, left)
                return number
        # Those with the fewest GPUs first: what asks for none shall not open a node that has some.
        for name, group in sorted(self._groups.items(), key=lambda item: item[1].gpus):
            whole = {"CPU": float(group.cpus), "GPU": float(group.gpus), **group.resources}
            if _fits(bundle, whole):
                _take(bundle, whole)
                self._left.append((name, whole))
                return len(self._left) - 1
        asked = ", ".join(f"{kind} {amount:g}" for kind, amount in sorted(bundle.items()))
        raise ConfigError(
            f"workers: no group has a node for {role} ({asked} on one node)",
            "raise workers.<group>.gpus, cpus or resources, or change cluster.<role> of the config",
        )

    def counts(self) -> dict[str, int]:
        return {name: sum(of == name for of, _ in self._left) for name in self._groups}


def nodes_needed(config: Config, groups: Mapping[str, WorkerGroup]) -> dict[str, int]:
    """Nodes of each group that the largest stage's actors fill; stages follow each other.

    Raises:
        ConfigError: a rank fits no node.
    """
    needed = dict.fromkeys(groups, 0)
    for together in plans(config):
        nodes = _Nodes(groups)
        requests = [request for ranks in _sets(config, together) for request in _requests(ranks)]
        for role, bundles in sorted(requests, key=lambda request: _size(request[1]), reverse=True):
            taken: list[int] = []
            for bundle in bundles:
                taken.append(nodes.place(role, bundle, taken))
        for name, count in nodes.counts().items():
            needed[name] = max(needed[name], count)
    return needed


def _sets(config: Config, together: Sequence[RolePlacement]) -> list[list[RolePlacement]]:
    """Roles that share devices together, the others alone."""
    sets: dict[tuple[str, ...], list[RolePlacement]] = {}
    for placement in together:
        sets.setdefault(config.cluster.sharing(placement.role) or (placement.role,), []).append(placement)
    return list(sets.values())


def _requests(ranks: Sequence[RolePlacement]) -> list[tuple[str, list[Bundle]]]:
    """(role, bundles that lie on different nodes), one by one unless the strategy is strict."""
    role, strategy = "+".join(p.role for p in ranks), ranks[0].strategy
    bundles: list[Bundle] = list(shared_bundles(ranks) if len(ranks) > 1 else ranks[0].bundles())
    if strategy == "strict_spread":
        return [(role, bundles)]
    if strategy == "strict_pack":
        return [(role, [{kind: sum(b.get(kind, 0.0) for b in bundles) for kind in bundles[0]}])]
    return [(role, [bundle]) for bundle in bundles]


def _size(bundles: Sequence[Bundle]) -> tuple[float, float]:
    return bundles[0].get("GPU", 0.0), bundles[0].get("CPU", 0.0)


def _fits(bundle: Bundle, room: Mapping[str, float]) -> bool:
    return all(amount <= room.get(kind, 0.0) + SLACK for kind, amount in bundle.items())


def _take(bundle: Bundle, room: dict[str, float]) -> None:
    for kind, amount in bundle.items():
        room[kind] -= amount
