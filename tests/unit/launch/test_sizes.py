"""How many nodes a config needs, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.errors import ConfigError
from rayrlhf.launch.sizes import nodes_needed
from rayrlhf.launch.values import WorkerGroup
from tests.unit.launch.made_values import config

GPU = WorkerGroup(gpus=8, cpus=96)
CPU = WorkerGroup(cpus=4)


def roles(gpus: float | None = None, **ranks: int) -> dict[str, Any]:
    one = {} if gpus is None else {"gpus": gpus}
    return {"device": "cuda", **{role: {"ranks": count, **one} for role, count in ranks.items()}}


def test_roles_with_a_gpu_a_rank_fill_nodes_of_eight() -> None:
    # PPO: 8 + 8 + 4 + 2 + one engine = 23 GPUs: three nodes. The supervised stages: 16 GPUs, two nodes, before that.
    cluster = roles(policy=8, value=8, reference=4, reward=2, train=16)
    assert nodes_needed(config(cluster=cluster), {"gpu": GPU}) == {"gpu": 3}


def test_an_engine_of_several_gpus_lies_on_one_node() -> None:
    # Three engines of 5 GPUs: no two on a node of eight; the four other roles fit in the gaps of 3.
    run = config(cluster=roles(), rollout={"engines": 3, "tensor_parallel": 5})
    assert nodes_needed(run, {"gpu": GPU}) == {"gpu": 3}


def test_roles_that_share_devices_count_once() -> None:
    together = [["policy", "value", "reference", "reward"]]
    cluster = roles(policy=8, value=8, reference=8, reward=8, train=8) | {"shared": together}
    # 8 GPUs of the set and one of the engine; apart they are 33.
    assert nodes_needed(config(cluster=cluster), {"gpu": GPU}) == {"gpu": 2}
    assert nodes_needed(config(cluster=cluster | {"shared": []}), {"gpu": GPU}) == {"gpu": 5}


def test_parts_of_a_gpu_add_up_to_whole_ones() -> None:
    cluster = roles(gpus=0.25, policy=8, value=8, reference=8, reward=8) | {"rollout": {"gpus": 0.25}}
    # 32 quarters are eight GPUs; the engine's is the first of a ninth.
    assert nodes_needed(config(cluster=cluster), {"gpu": GPU}) == {"gpu": 2}


def test_ranks_that_must_lie_apart_take_a_node_each() -> None:
    cluster = roles() | {"policy": {"ranks": 3, "strategy": "strict_spread"}}
    assert nodes_needed(config(cluster=cluster), {"gpu": GPU}) == {"gpu": 3}


def test_ranks_that_must_lie_together_need_a_node_with_room_for_all() -> None:
    cluster = {"policy": {"ranks": 5, "cpus": 1, "strategy": "strict_pack"}}
    with pytest.raises(ConfigError, match=r"no group has a node for policy \(CPU 5 on one node\)"):
        nodes_needed(config(cluster=cluster), {"cpu": CPU})


def test_ranks_without_gpus_go_to_nodes_without_gpus() -> None:
    # Five roles of 0.4 CPUs are 2.0, the supervised stages' three workers of one CPU are 3: one node of four.
    assert nodes_needed(config(cluster={"train": {"ranks": 3, "cpus": 1}}), {"gpu": GPU, "cpu": CPU}) == {
        "gpu": 0,
        "cpu": 1,
    }


def test_a_custom_resource_asks_for_the_group_that_has_it() -> None:
    cluster = {"rollout": {"resources": {"fast_disk": 0.5}}}
    groups = {"plain": CPU, "disks": WorkerGroup(cpus=4, resources={"fast_disk": 1})}
    assert nodes_needed(config(cluster=cluster, rollout={"engines": 3}), groups) == {"plain": 1, "disks": 2}
    with pytest.raises(ConfigError, match="no group has a node for rollout"):
        nodes_needed(config(cluster=cluster), {"plain": CPU})
