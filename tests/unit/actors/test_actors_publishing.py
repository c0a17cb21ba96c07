"""The two sides of a publish find each other: who meets whom, and nobody waits in a broadcast for one who is not told.

The group of a transport that meets is a broadcast: it is over when every rank of it has taken part.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from rayrlhf.actors.pool import EnginePool
from rayrlhf.actors.publishing import EngineSide, PolicySide
from rayrlhf.errors import ActorError, ActorLost
from rayrlhf.types import PromptTokens, RolloutInfo, SampleRequest
from rayrlhf.weights.probe import ProbeRow
from rayrlhf.weights.publish import EngineReceipt, SentBucket, WeightPublisher
from rayrlhf.weights.transports import TRANSPORTS, Meeting

PROMPTS = [PromptTokens(i, [1]) for i in range(8)]  # type: ignore[arg-type]
DEADLINE_S = 0.5


class Meets:
    """A group of actors that form a group of the transport's own."""

    devices = None

    def __init__(self, role: str, ranks: int, nodes: Sequence[str] = ()) -> None:
        self.role, self.ranks = role, ranks
        self.nodes = nodes or ["node"] * ranks
        self.met, self.lost = dict[int, Meeting](), set[int]()
        self.started: list[tuple[Any, ...]] = []

    async def call_rank(self, rank: int, method: str, *args: Any) -> Any:
        await asyncio.sleep(0)
        if rank in self.lost:
            raise ActorLost(f"{self.role} rank {rank}: the actor died")
        if method == "node":
            return self.nodes[rank]
        if method == "free_address":
            return "10.0.0.1", 555
        self.met[rank] = args[0]
        return None

    async def call(self, method: str, *shared: Any, each: Sequence[tuple[Any, ...]] = ()) -> list[Any]:
        if method == "probe":
            return [[0.0]]
        self.started.append(shared)
        handles = [{f"GPU {rank}": rank} for rank in range(self.ranks)]
        return [SentBucket({"header": {}, "handles": h}, "f", 8, True) for h in handles]


def sides(
    policy: Meets, engines: Meets, transport: str = "nccl", workers: int = 2
) -> tuple[PolicySide, list[EngineSide]]:
    source = PolicySide(policy, engines, TRANSPORTS[transport], workers)  # type: ignore[arg-type]
    return source, [EngineSide(engines, rank) for rank in range(engines.ranks)]  # type: ignore[arg-type]


def test_a_transport_with_a_group_meets_once_with_a_rank_for_every_worker_of_every_engine():
    policy, engines = Meets("policy", 2), Meets("rollout", 3)
    source, every = sides(policy, engines)
    asyncio.run(source.to(every).start_publish(0))
    assert policy.met == {0: Meeting("10.0.0.1", 555, 7, 0)}
    assert engines.met == {i: Meeting("10.0.0.1", 555, 7, 1 + 2 * i) for i in range(3)}
    engines.met = {}
    asyncio.run(source.to(every).start_publish(1))
    assert engines.met == {}


def test_the_group_is_those_whom_a_publish_goes_to_and_meets_anew_whenever_they_are_others():
    policy, engines = Meets("policy", 1), Meets("rollout", 3)
    source, every = sides(policy, engines)
    asyncio.run(source.to(every).start_publish(0))
    engines.met = {}
    asyncio.run(source.to(every[1:2], again=True).start_publish(0))
    assert (policy.met, engines.met) == ({0: Meeting("10.0.0.1", 555, 3, 0)}, {1: Meeting("10.0.0.1", 555, 3, 1)})
    asyncio.run(source.to(every).start_publish(1))
    assert engines.met == {i: Meeting("10.0.0.1", 555, 7, 1 + 2 * i) for i in range(3)}
    assert [again for _, _, again in policy.started] == [False, True, False]


def test_an_engine_that_died_with_the_policys_node_is_left_out_of_the_group_and_does_not_end_the_publish():
    policy, engines = Meets("policy", 2), Meets("rollout", 3)
    engines.lost = {1}
    source, every = sides(policy, engines)
    asyncio.run(source.to(every).start_publish(0))
    assert policy.met == {0: Meeting("10.0.0.1", 555, 5, 0)}
    assert engines.met == {0: Meeting("10.0.0.1", 555, 5, 1), 2: Meeting("10.0.0.1", 555, 5, 3)}


def test_the_handles_of_all_ranks_go_out_with_rank_0s_ticket():
    source, _ = sides(Meets("policy", 2), Meets("rollout", 1))
    bucket = asyncio.run(source.next_bucket())
    assert bucket.ticket == {"header": {}, "handles": {"GPU 0": 0, "GPU 1": 1}}


@pytest.mark.parametrize(
    ("transport", "nodes", "relayed"),
    [
        ("shared_memory", ["home", "home"], False),
        ("shared_memory", ["home", "away"], True),
        ("ipc", ["home", "away"], False),  # each rank of the policy serves the engines on its own GPU
        ("nccl", ["home", "away"], False),
    ],
)
def test_buckets_go_through_rays_store_where_an_engine_cannot_get_at_them_otherwise(transport, nodes, relayed):
    policy, engines = Meets("policy", 2, ["home", "away"]), Meets("rollout", 2, nodes)
    source, every = sides(policy, engines, transport, workers=1)
    asyncio.run(source.to(every).start_publish(0))
    assert policy.started == [(0, relayed, False)]


class Broadcasts(Meets):
    """Engines whose buckets come once every rank of the group is in the broadcast, or at the deadline not at all."""

    def __init__(self, ranks: int) -> None:
        super().__init__("rollout", ranks)
        self.dies: int | None = None
        self.came, self.all_here = set[int](), asyncio.Event()
        self._parts: dict[int, list[Any]] = {}

    async def call_rank(self, rank: int, method: str, *args: Any) -> Any:
        if method == "generate" and rank == self.dies:
            self.lost.add(rank)
        if method in ("node", "meet") or rank in self.lost:
            return await super().call_rank(rank, method, *args)
        if method == "verify":
            self.came.add(self.met[rank].rank)
            if len(self.came) == self.met[rank].world_size - 1:
                self.all_here.set()
            await asyncio.wait_for(self.all_here.wait(), DEADLINE_S)
            self.came, self.all_here = set(), asyncio.Event()
            return EngineReceipt(("f",), (), (0.0,))
        if method == "generate":
            _, share, at_once, _ = args
            self._parts[rank] = [share[i : i + at_once] for i in range(0, len(share), at_once)]
        part = self._parts[rank].pop(0)
        return [RolloutInfo(r.sample_id, r.prompt_id, 10, 3, False) for r in part], "rollouts"


@pytest.mark.parametrize(("fixed", "starts_s"), [(True, 0.0), (False, 0.0), (False, 60.0)])
def test_an_engine_that_is_replaced_keeps_nobody_waiting_whether_it_comes_back_late_or_not_yet(fixed, starts_s):
    async def run() -> None:
        policy, engines = Meets("policy", 1), Broadcasts(3)

        async def replace(rank: int, error: ActorError) -> None:
            await asyncio.sleep(starts_s)
            engines.dies = None
            engines.lost.discard(rank)
            del engines.met[rank]

        publisher = WeightPublisher([ProbeRow([1], [1])], "float32", None)
        pool = EnginePool(engines, policy, publisher, PROMPTS, fixed, "nccl", 1, replace)  # type: ignore[arg-type]
        await pool.publish(0)
        engines.dies = 1
        drawn = [
            info async for part in pool.generate([SampleRequest(i, i, i) for i in range(8)]) for info in part.infos
        ]
        assert sorted(info.sample_id for info in drawn) == list(range(8))
        for version in (1, 2):
            published = await pool.publish(version)
            assert not {"rollout-0", "rollout-2"} - set(published.committed)
        await pool.close()

    asyncio.run(asyncio.wait_for(run(), 10.0))
