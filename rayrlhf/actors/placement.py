"""Which role gets what: the config as bundles of placement groups, and whether the cluster has them. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rayrlhf.algorithms.advantages import ESTIMATORS
from rayrlhf.config import Config
from rayrlhf.config.cluster import RankResources
from rayrlhf.config.run import StageName
from rayrlhf.errors import ResourceError

__all__ = [
    "SAMPLING",
    "TRAINING",
    "RolePlacement",
    "check_resources",
    "largest_first",
    "plan_ppo",
    "plan_training",
    "plans",
    "promised_cpus",
    "shared_bundles",
]


ROLES = ("policy", "reference", "reward", "value", "rollout")
TRAINING: tuple[StageName, ...] = ("pretrain", "sft", "reward", "dpo")
# The roles of the stages that sample; None is all that PPO needs.
SAMPLING: dict[StageName, tuple[str, ...] | None] = {
    "collect": ("policy", "rollout"),
    "ppo": None,
    "eval": ("policy", "reference", "reward", "rollout"),
}


@dataclass(frozen=True, slots=True)
class RolePlacement:
    """One role's ranks, all alike."""

    role: str
    ranks: int
    cpus: float
    gpus: float
    threads: int
    resources: Mapping[str, float] = field(default_factory=dict)
    """custom ones of Ray's nodes"""
    strategy: str = "pack"

    def bundles(self) -> list[dict[str, float]]:
        bundle = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return [{k: v for k, v in bundle.items() if v} or {"CPU": 0.01} for _ in range(self.ranks)]

    def environment(self) -> dict[str, str]:
        """For the rank's process, set before any library is imported."""
        # Spinning OpenMP threads of several processes on few cores slow each other down many times over.
        return {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def plan_ppo(
    config: Config, among: Collection[str] | None = None, scoring_text: bool | None = None
) -> list[RolePlacement]:
    """The five roles of a PPO run; four where the advantages need no value model. Other stages take some: `among`.

    Args:
        scoring_text: whether the role reward reads text and so asks for no GPU; None, as PPO has it.
    """
    on_cpu = config.ppo.reward.sees_text if scoring_text is None else scoring_text
    cluster = config.cluster
    without = () if ESTIMATORS[config.ppo.advantage].needs_values else ("value",)
    names = [name for name in ROLES if name not in without and (among is None or name in among)]

    def gpus(role: str, rank: RankResources) -> float:
        """A role has its part of a device that it shares with others of these."""
        if role == "reward" and on_cpu and rank.gpus is None:
            return 0.0
        return cluster.gpus(rank) / (sum(other in names for other in cluster.sharing(role)) or 1)

    roles = [
        RolePlacement(role, r.ranks, r.cpus, gpus(role, r), r.threads, r.resources, r.strategy)
        for role, r in (
            ("policy", cluster.policy),
            ("reference", cluster.reference),
            ("reward", cluster.reward),
            ("value", cluster.value),
        )
    ]
    shards, engine = config.rollout.tensor_parallel, cluster.rollout
    roles.append(
        RolePlacement(
            "rollout",
            config.rollout.engines,
            engine.cpus * shards,
            gpus("rollout", engine) * shards,
            engine.threads,
            engine.resources,
            engine.strategy,
        )
    )
    return [placement for placement in roles if placement.role in names]


def largest_first(placements: Sequence[RolePlacement]) -> list[RolePlacement]:
    """The order to reserve them in.

    Ray begins a group on the emptiest node, also for one rank of one GPU: an engine that needs a whole node would find
    each of them begun, however much of the cluster is free.
    """
    return sorted(placements, key=lambda placement: -placement.gpus)


def shared_bundles(placements: Sequence[RolePlacement]) -> list[dict[str, float]]:
    """Of roles on the same devices: a bundle for each rank, with room for that rank of all of them."""
    first = placements[0]
    cpus, gpus = sum(p.cpus for p in placements), round(sum(p.gpus for p in placements))
    return replace(first, cpus=cpus, gpus=gpus, resources=_times(first.resources, len(placements))).bundles()


def _times(resources: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: amount * factor for name, amount in resources.items()}


def plan_training(config: Config) -> RolePlacement:
    """The workers of `TRAINING` stages."""
    train = config.cluster.train
    gpus = config.cluster.gpus(train)
    return RolePlacement("train", train.ranks, train.cpus, gpus, train.threads, train.resources, train.strategy)


def plans(config: Config) -> list[list[RolePlacement]]:
    """What is placed together, one group after the other: the supervised stages' workers, then the roles of PPO."""
    stages = config.stages()
    groups = [[plan_training(config)]] if any(stage in TRAINING for stage in stages) else []
    for stage, roles in SAMPLING.items():
        if stage in stages:
            groups.append(plan_ppo(config, roles, scoring_text=None if stage == "ppo" else False))
    return groups


def required(config: Config) -> dict[str, float]:
    """CPUs, GPUs and custom resources that the run needs at once: stages follow each other, so the largest counts."""
    together = plans(config)
    kinds = sorted({kind for group in together for p in group for kind in p.resources})
    return {kind: max(_asked(group, kind) for group in together) for kind in ("CPU", "GPU", *kinds)}


def _asked(group: Sequence[RolePlacement], kind: str) -> float:
    return sum(p.ranks * _of_rank(p, kind) for p in group)


def _of_rank(placement: RolePlacement, kind: str) -> float:
    own = {"CPU": placement.cpus, "GPU": placement.gpus, **placement.resources}
    return own.get(kind, 0.0)


def promised_cpus(config: Config) -> float:
    """CPUs that a Ray of our own must have: actors kept for a later stage stay beside the workers of those between."""
    training = plan_training(config)
    return training.ranks * training.cpus + max(sum(p.ranks * p.cpus for p in group) for group in plans(config))


def check_resources(config: Config, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise ResourceError when the cluster lacks what the config asks for, or no node has the room for a rank of it.

    Args:
        nodes: what each of them has.
    """
    for kind, asked in required(config).items():
        found = sum(node.get(kind, 0.0) for node in nodes)
        if asked > found + 1e-6:
            known = kind in ("CPU", "GPU")
            named, key = (f"{kind}s", f"{kind.lower()}s") if known else (f"of {kind!r}", f"resources.{kind}")
            largest = max(plans(config), key=lambda group: _asked(group, kind))
            shares = ", ".join(f"{p.role} {p.ranks} x {_of_rank(p, kind):g}" for p in largest if _of_rank(p, kind))
            raise ResourceError(
                f"the config asks for {asked:g} {named}, the cluster has {found:g} ({shares})",
                "set cluster.device=cpu" if kind == "GPU" and not found else f"lower cluster.<role>.{key}",
            )
    for placement in itertools.chain(*plans(config)):
        _check_nodes(placement, nodes)


def _check_nodes(placement: RolePlacement, nodes: Sequence[Mapping[str, float]]) -> None:
    """Where everything were empty: what nobody else takes part in keeps a rank from any node, or its group together."""
    role, ranks, bundle = placement.role, placement.ranks, placement.bundles()[0]
    room = [min(int(node.get(kind, 0.0) / asked + 1e-6) for kind, asked in bundle.items()) for node in nodes]
    wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
    if not max(room):
        key = "rollout.tensor_parallel" if role == "rollout" and placement.gpus > 1 else f"cluster.{role}.*"
        raise ResourceError(f"no node has room for one rank of {role} ({wanted})", f"lower {key}")
    if sum(room) < ranks:
        raise ResourceError(
            f"the nodes have room for {sum(room)} of the {ranks} ranks of {role} ({wanted} each)",
            f"lower cluster.{role}.*, or take another number of shards or ranks, so that nodes are filled",
        )
    if placement.strategy == "strict_pack" and max(room) < ranks:
        raise ResourceError(
            f"no node has room for the {ranks} ranks of {role} ({wanted} each), the roomiest for {max(room)}",
            f"lower cluster.{role}.ranks, or set cluster.{role}.strategy=pack",
        )
    if placement.strategy == "strict_spread" and (found := sum(map(bool, room))) < ranks:
        raise ResourceError(
            f"{role} wants {ranks} nodes with room for a rank ({wanted}), the cluster has {found}",
            f"lower cluster.{role}.ranks, or set cluster.{role}.strategy=spread",
        )
