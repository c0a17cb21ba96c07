"""The actor graph of InstructGPT's 175B, on a Ray whose nodes say that they have eight GPUs each.

    python benchmarks/large_graph.py [--nodes 64] [--share 8] [--lose policy] [--json]

No GPU, no model, no torch in an actor: who sits where, who asks whom, who comes back. Config, placement, groups, pool,
roles, loop and recovery are the product's own; the actors are those of control.py.

1. `full`: PACK, played through on paper, for the whole graph on 64 nodes x 8 GPUs.
2. `reserved`: with `--nodes 64` the whole graph's bundles are reserved, no actor in them. A node takes 2 s and 130 MB.
3. `started`: 1 / `--share` of every role's ranks as actors: where Ray has put them, a step, a node of each role of
   `--lose` taken away, another step. The share must be small enough for the nodes and for this machine's memory.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import control
import psutil
import ray
import typer
from common import print_result, print_table
from control import Engine, Model, Nothing, _new_ledger
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from rich.console import Console

from rayrlhf.actors.base import Actor
from rayrlhf.actors.cluster import resources_of_nodes
from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.placement import RolePlacement, check_resources, largest_first, plan_ppo
from rayrlhf.actors.roles import LearnerRoles, ScorerRoles, StepPlan
from rayrlhf.algorithms.kl import FixedKL
from rayrlhf.config import Config, load_config
from rayrlhf.driver.loop import Parts, run_ppo
from rayrlhf.driver.pacing import PromptStream, SyncPacing
from rayrlhf.engines import distributed
from rayrlhf.engines.distributed import Rendezvous
from rayrlhf.errors import ActorLost, ResourceError
from rayrlhf.metrics.clock import StepClock
from rayrlhf.stages import roles as stage_roles
from rayrlhf.stages.roles import RoleSet
from rayrlhf.stages.sources import PPOModels
from rayrlhf.types import PromptTokens
from rayrlhf.weights import transports
from rayrlhf.weights.publish import SentBucket

CONFIG = Path(__file__).parents[1] / "configs" / "instructgpt" / "175b.yaml"
GPUS, CPUS = 8, 64
START_S, LOAD_S = 300.0, 1.0
ROLES = ("policy", "reference", "reward", "value", "rollout")


class Seat(Actor):
    """Says where it sits. Loading takes its time, as a real one's does."""

    def __init__(self, log: str, settings: dict[str, int]) -> None:
        super().__init__(log)
        self.seconds, self.settings = 0.0, settings

    def start(self, _: Any) -> None:
        self.load()

    def load(self) -> None:
        time.sleep(self.settings["load_s"])

    def tell(self, settings: dict[str, int]) -> None:
        self.settings = settings

    def seat(self) -> tuple[str, list[int]]:
        return self.node(), [int(i) for i in ray.get_gpu_ids()]

    def memory_gib(self) -> float:
        return 0.0

    def meet(self, meeting: Any) -> None: ...


class SeatedEngine(Seat, Engine): ...


class SeatedModel(Seat, Model):
    def start(self, meeting: Rendezvous) -> None:
        self.rank = meeting.rank
        self.load()

    def next_bucket(self) -> SentBucket | None:  # type: ignore[override]
        if self.rank:
            return None
        self.buckets = self.settings["buckets"]
        sent = super().next_bucket()
        sent.ticket["header"]["specs"] = [f"parameter.{i}" for i in range(self.settings["parameters"])]
        return sent


class Roles(RoleSet):
    """The stage's own, but for what the actors are told: it would bring torch into them."""

    told: dict[str, int]

    def settings(self, role: str, config: Config, model: str | None = None) -> Any:
        return self.told

    def _engine_settings(self) -> Any:
        return self.told

    def _context_tokens(self) -> int:
        return 2048


def main(
    nodes: int = 64,
    share: int = 8,
    lose: str = "policy",
    as_json: Annotated[bool, typer.Option("--json", help="The last line alone.")] = False,
) -> None:
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "0"}
    whole, config = load_config(CONFIG), load_config(CONFIG, _scaled(share))
    planned = largest_first(plan_ppo(whole))
    full = [_row(p, packed) for p, packed in zip(planned, pack(planned, 64), strict=True)]
    before, start = psutil.virtual_memory().available, time.perf_counter()
    for module in (control, distributed, transports):  # by name, their imports would bring torch into every actor
        ray.cloudpickle.register_pickle_by_value(module)
    cluster = _cluster(nodes)
    try:
        facts: dict[str, Any] = {"nodes": nodes, "cluster_s": time.perf_counter() - start}
        check_resources(config, resources_of_nodes())
        if nodes * GPUS >= sum(row["ranks"] * row["gpus"] for row in full):
            facts["reserved"] = asyncio.run(_reserve(whole))
        facts["create_ms"] = asyncio.run(_create())
        facts["started"] = asyncio.run(_Graph(cluster, config, lose.split(",")).run())
        facts["gib"] = (before - facts["started"].pop("available")) / 2**30
    finally:
        ray.shutdown()
        cluster.shutdown()
    facts |= {"full": full, "seconds": time.perf_counter() - start}
    if not as_json:
        print_table(f"the whole graph on 64 nodes x {GPUS} GPUs, on paper", full)
        print_table(f"1/{share} of it, on {nodes} nodes", facts["started"]["roles"])
    print_result(facts)


def _scaled(share: int) -> list[str]:
    """Overrides: so many times fewer ranks, engines and responses."""
    config = load_config(CONFIG)
    ranks = {role: getattr(config.cluster, role).ranks for role in ROLES[:-1]}
    return [
        *(f"cluster.{role}.ranks={count // share}" for role, count in ranks.items()),
        f"rollout.engines={config.rollout.engines // share}",
        f"ppo.batch_size={config.ppo.batch_size // share}",
        f"ppo.minibatch_size={config.ppo.minibatch_size // share}",
        f"cluster.start_timeout_s={START_S}",
        "cluster.recovery.backoff_s=0",
    ]


def pack(placements: Sequence[RolePlacement], nodes: int, cpus: float = CPUS) -> list[list[int]]:
    """Ray's PACK (bundle_scheduling_policy.cc, scorer.cc), group after group: the GPUs of each by node.

    It takes the node of which a bundle leaves most, puts there what it holds, and goes on with the next best one.

    Raises:
        ResourceError: a group finds no room.
    """
    free = [(float(GPUS), float(cpus))] * nodes
    return [_packed(placement, free) for placement in placements]


def _packed(placement: RolePlacement, free: list[tuple[float, float]]) -> list[int]:
    needs = placement.gpus, placement.cpus

    def left(node: int) -> float:
        return sum((has - need) / has for has, need in zip(free[node], needs, strict=True))

    def fits(node: int) -> bool:
        return all(has >= need for has, need in zip(free[node], needs, strict=True))

    held: Counter[int] = Counter()
    while held.total() < placement.ranks:
        candidates = [node for node in range(len(free)) if node not in held and fits(node)]
        if not candidates:
            raise ResourceError(f"{placement.role}: {held.total()} of {placement.ranks} find room")
        best = max(candidates, key=left)
        while held.total() < placement.ranks and fits(best):
            held[best] += 1
            free[best] = free[best][0] - needs[0], free[best][1] - needs[1]
    return [round(ranks * placement.gpus) for ranks in held.values()]


def _row(placement: RolePlacement, by_node: Sequence[int]) -> dict[str, Any]:
    return {
        "role": placement.role,
        "ranks": placement.ranks,
        "gpus": placement.gpus,
        "nodes": len(by_node),
        "gpus_by_node": sorted(by_node, reverse=True),
    }


def _cluster(nodes: int) -> Cluster:
    system = {
        # A node that is gone is to be missed within seconds; many processes on few cores are slow to say that they run.
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 5,
        "worker_register_timeout_seconds": 300,
    }
    head = {"num_cpus": 4, "include_dashboard": False, "_system_config": system}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(nodes):
        cluster.add_node(wait=False, num_cpus=CPUS, num_gpus=GPUS, object_store_memory=80 * 2**20)
    cluster.wait_for_nodes(START_S)
    ray.init(cluster.address, log_to_driver=False, configure_logging=False, namespace="large-graph")
    return cluster


async def _create(count: int = 384) -> float:
    """Milliseconds of the driver's for each actor of a group: no node has room, so that no process starts."""
    group = ActorGroup(RolePlacement("created", count, CPUS + 1, 0, 1), START_S)
    try:
        group._made_of = ray.remote(SeatedModel), [("/dev/null", {})] * count
        start = time.perf_counter()
        group.actors = [group._create(rank) for rank in range(count)]
        return 1000 * (time.perf_counter() - start) / count
    finally:
        group.close()


async def _reserve(config: Config) -> dict[str, Any]:
    """Every bundle of the whole graph."""
    start, planned = time.perf_counter(), largest_first(plan_ppo(config))
    groups = [ActorGroup(placement, START_S) for placement in planned]
    try:
        for group in groups:
            await group._room(START_S)
        rows = [_row(group.placement, _by_node(group)) for group in groups]
        return {"seconds": time.perf_counter() - start, "bundles": sum(p.ranks for p in planned), "roles": rows}
    finally:
        for group in groups:
            group.close()


def _by_node(group: ActorGroup) -> list[int]:
    nodes = placement_group_table(group._bundles)["bundles_to_node_id"].values()
    return [round(count * group.placement.gpus) for count in Counter(nodes).values()]


class _Graph:
    """A share of the graph as actors, from start to end."""

    def __init__(self, cluster: Cluster, config: Config, lose: Sequence[str]) -> None:
        self.cluster = cluster
        self.config = config
        self.lose = lose
        self.calls: Counter[str] = Counter()
        """of the driver, by method"""

    async def run(self) -> dict[str, Any]:
        self._count_calls()
        with tempfile.TemporaryDirectory() as folder:
            roles, start = self._roles(Path(folder)), time.perf_counter()
            try:
                await roles.start()
                facts: dict[str, Any] = {"start_s": time.perf_counter() - start}
                seats = await self._seats(roles)
                facts["roles"] = [_row(roles.groups[r].placement, [*_gpus(seats[r]).values()]) for r in ROLES]
                facts["loading_s"] = await self._load_again(roles)
                step, _ = await self._steps(roles, Path(folder), 0)  # in it policy and engines find each other
                facts["calls"] = {}
                for buckets, parameters in ((1, 1), (1, 1000), (3, 1)):
                    await self._tell(roles, buckets, parameters)
                    step, calls = await self._steps(roles, Path(folder), step)
                    facts["calls"][f"{buckets} x {parameters}"] = calls
                facts["available"] = psutil.virtual_memory().available
                gone = self._remove(seats)
                facts |= await self._go_on(roles, Path(folder), step)
                after = await self._seats(roles)
                facts["lost"] = {role: _moved(seats[role], after[role], gone) for role in ROLES}
                facts["roles_after"] = [_row(roles.groups[r].placement, [*_gpus(after[r]).values()]) for r in ROLES]
                return facts
            finally:
                await roles.stop()

    def _roles(self, folder: Path) -> Roles:
        stage_roles.RolloutActor = SeatedEngine  # type: ignore[misc,assignment]
        context: Any = SimpleNamespace(
            config=self.config,
            folder=folder,
            console=Console(quiet=True),
            kept=SimpleNamespace(take=lambda role, fit: None),
            head_lost=False,
            log=lambda name: str(folder / f"{name}.log"),
            data=SimpleNamespace(tokenizer=range(50257)),
        )
        models = dict.fromkeys(ROLES, "none")
        planned = PPOModels(models, dict.fromkeys(ROLES[:-1], SeatedModel), None)
        Roles.told = {"load_s": LOAD_S, "buckets": 1, "parameters": 1}  # type: ignore[dict-item]
        self.prompts = [PromptTokens(i, [1] * 32) for i in range(4 * self.config.ppo.batch_size)]  # type: ignore[arg-type]
        return Roles(context, ROLES, models, self.prompts, planned=planned)

    def _count_calls(self) -> None:
        wait = ActorGroup._wait

        async def counted(group: ActorGroup, refs: list[Any], method: str, *rest: Any, **named: Any) -> list[Any]:
            self.calls[method] += len(refs)
            return await wait(group, refs, method, *rest, **named)

        ActorGroup._wait = counted  # type: ignore[method-assign]

    async def _tell(self, roles: Roles, buckets: int, parameters: int) -> None:
        await roles.groups["policy"].call("tell", {"load_s": LOAD_S, "buckets": buckets, "parameters": parameters})

    async def _load_again(self, roles: Roles) -> float:
        start = time.perf_counter()
        await asyncio.gather(*(group.call("load") for group in roles.groups.values()))
        return time.perf_counter() - start

    async def _seats(self, roles: Roles) -> dict[str, list[tuple[str, list[int]]]]:
        return {role: await roles.groups[role].call("seat") for role in ROLES}

    async def _steps(self, roles: Roles, folder: Path, step: int) -> tuple[int, Counter[str]]:
        """One more step; the calls that it took, those of the publish before it too."""
        before, ppo, groups = Counter(self.calls), self.config.ppo, roles.groups
        plan = StepPlan(ppo.minibatch_size, ppo.epochs, 0, 1, 0, 1.0, lambda step: (1e-5, 1e-5))
        nothing, ids = Nothing(), [p.prompt_id for p in self.prompts]
        clock, pool = StepClock(folder / "trace.json"), roles.pool()
        frozen, learning = [groups["reference"], groups["reward"]], [groups["policy"], groups["value"]]
        parts = Parts(
            rollout=pool,
            scorers=ScorerRoles(frozen, learning, roles.replace),
            learners=LearnerRoles(groups["policy"], groups["value"], plan),
            weights=pool,
            checkpoints=nothing,
            ledger=_new_ledger(tempfile.mkdtemp(dir=folder), ids, ppo.batch_size),
            sink=nothing,
            clock=clock,
            gauges=nothing.gauges,
        )
        try:
            pacing = SyncPacing(PromptStream(ids, seed=step), ppo.batch_size, step + 1, clock, step)
            return await run_ppo(parts, pacing, FixedKL(0.0), step), self.calls - before
        finally:
            clock.close()

    def _remove(self, seats: dict[str, list[tuple[str, list[int]]]]) -> set[str]:
        """The node under rank 0 of each role that is to lose one, at once and without a word."""
        gone = {seats[role][0][0] for role in self.lose}
        for node in [node for node in self.cluster.worker_nodes if node.node_id in gone]:
            self.cluster.remove_node(node, allow_graceful=False)
        return gone

    async def _go_on(self, roles: Roles, folder: Path, step: int) -> dict[str, Any]:
        """Until the next step is done. Learners are replaced here, as by the stage; the others see to it themselves."""
        start, replaced = time.perf_counter(), list[str]()
        while True:
            try:
                step, _ = await self._steps(roles, folder, step)
                return {"replaced": replaced, "recovery_s": time.perf_counter() - start, "steps": step}
            except ActorLost as lost:
                if lost.role not in ("policy", "value"):
                    raise
                replaced.append(lost.role)
                await roles.replace(lost.role, lost)


def _gpus(seats: Sequence[tuple[str, list[int]]]) -> Counter[str]:
    """Held on each node."""
    held: Counter[str] = Counter()
    for node, ids in seats:
        held[node] += len(ids)
    return held


def _moved(before: Sequence[Any], after: Sequence[Any], gone: set[str]) -> dict[str, int]:
    return {
        "ranks_lost": sum(node in gone for node, _ in before),
        "ranks_there_again": sum(b[0] in gone and a[0] not in gone for b, a in zip(before, after, strict=True)),
    }


if __name__ == "__main__":
    typer.run(main)
