"""A config for GPUs on a real Ray that was told of eight: every rank gets what it asked for, and no two the same.

The GPUs are declared, not there: this is about who sits where. No model is loaded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from rayrlhf.actors.cluster import disconnect
from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.placement import check_resources, plan_ppo, plan_training
from rayrlhf.actors.sharing import SharedDevices
from rayrlhf.config import Config
from rayrlhf.errors import ResourceError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(150)]

GPUS = 8
Seats = dict[str, list[tuple[list[int], str]]]


def config(engines: int = 2, tensor_parallel: int = 2, **cluster: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "org/name"},
            "world": {"name": "instructions"},
            "cluster": {
                "device": "cuda",
                "policy": {"ranks": 2, "cpus": 0.1},
                **{role: {"cpus": 0.1} for role in ("value", "rollout")},
                **{role: {"gpus": 0.5, "cpus": 0.1} for role in ("reference", "reward")},
                **cluster,
            },
            "rollout": {"engines": engines, "tensor_parallel": tensor_parallel},
        }
    )


def seat_class() -> type:
    class Seat:
        def where(self) -> tuple[list[int], str]:
            """Ray's ids of this actor's GPUs, and what its CUDA would see."""
            import os

            return [int(i) for i in ray.get_gpu_ids()], os.environ.get("CUDA_VISIBLE_DEVICES", "")

    return Seat


@pytest.fixture(scope="module")
def eight_gpus() -> Iterator[dict[str, float]]:
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=GPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace="placement",
    )
    yield ray.cluster_resources()
    disconnect()


@pytest.fixture(scope="module")
def seats(eight_gpus: dict[str, float]) -> Seats:
    """By role and rank, all roles at once."""

    async def sit() -> Seats:
        groups = [ActorGroup(placement, 60.0) for placement in plan_ppo(config())]
        found: Seats = {}
        for group in groups:
            await group.spawn(seat_class(), [()] * group.ranks, 60.0)
            found[group.role] = await group.call("where")
        for group in groups:
            group.close()
        return found

    return asyncio.run(sit())


def test_the_cluster_has_what_the_config_asks_for(eight_gpus: dict[str, float]) -> None:
    check_resources(config(), [eight_gpus])  # 2 + 1 + 0.5 + 0.5 + 2 x 2 of 8
    with pytest.raises(ResourceError, match="asks for 9 GPUs, the cluster has 8"):
        check_resources(config(policy={"ranks": 3, "cpus": 0.1}), [eight_gpus])


def test_every_rank_has_gpus_of_its_own_and_an_engine_one_a_shard(seats: Seats) -> None:
    held = {role: [len(ids) for ids, _ in ranks] for role, ranks in seats.items()}
    assert held == {"policy": [1, 1], "reference": [1], "reward": [1], "value": [1], "rollout": [2, 2]}
    whole = [i for role in ("policy", "value", "rollout") for ids, _ in seats[role] for i in ids]
    assert len(set(whole)) == len(whole) == 7


def test_roles_with_half_a_gpu_share_the_one_that_is_left(seats: Seats) -> None:
    whole = {i for role in ("policy", "value", "rollout") for ids, _ in seats[role] for i in ids}
    halves = [ids for role in ("reference", "reward") for ids, _ in seats[role]]
    assert halves == [[i] for i in set(range(GPUS)) - whole] * 2


def test_a_process_sees_its_own_gpus_and_no_others(seats: Seats) -> None:
    """`LOCAL_RANK` is 0 in every learner: its GPU is the first, and only, one that it sees."""
    for ranks in seats.values():
        for ids, visible in ranks:
            assert sorted(map(int, visible.split(","))) == sorted(ids)


def test_workers_of_the_supervised_stages_are_a_gpu_each(eight_gpus: dict[str, float]) -> None:
    assert plan_training(config(train={"ranks": 8, "cpus": 0.1})).bundles() == [{"CPU": 0.1, "GPU": 1.0}] * 8


def test_roles_that_share_devices_sit_on_the_same_ones_rank_by_rank(eight_gpus: dict[str, float]) -> None:
    ranks = {role: {"ranks": 3, "cpus": 0.1} for role in ("policy", "value")}
    shared = config(**ranks, shared=[["policy", "value", "rollout"]], tensor_parallel=1, engines=3)
    check_resources(shared, [eight_gpus])

    async def sit() -> Seats:
        placements = [p for p in plan_ppo(shared) if p.role in ("policy", "value", "rollout")]
        devices = SharedDevices(placements)
        groups = [ActorGroup(placement, 60.0, devices) for placement in placements]
        found: Seats = {}
        for group in groups:
            await group.spawn(seat_class(), [()] * group.ranks, 60.0)
            found[group.role] = await group.call("where")
        for group in groups:
            group.close()
        return found

    seats = {role: [ids for ids, _ in ranks] for role, ranks in asyncio.run(sit()).items()}
    assert seats["policy"] == seats["value"] == seats["rollout"]
    assert len({i for ids in seats["policy"] for i in ids}) == 3


def test_a_group_for_which_there_is_no_room_says_so(eight_gpus: dict[str, float]) -> None:
    async def sit() -> None:
        group = ActorGroup(plan_training(config(train={"ranks": 9, "cpus": 0.1})), 60.0)
        try:
            await group.spawn(seat_class(), [()] * 9, 2.0)
        finally:
            group.close()

    with pytest.raises(ResourceError, match=r"train: no room for 9 x \{'CPU': 0.1, 'GPU': 1.0\} within 2 s"):
        asyncio.run(sit())
