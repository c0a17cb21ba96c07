"""The actor graph of configs/instructgpt/175b.yaml: 176 actors, 400 GPUs of 64 nodes x 8. What is real, and what not:

- The whole graph on 64 nodes is played through on paper, by Ray's PACK as benchmarks/large_graph.py has it.
- An eighth of it, of the same shape, runs on a real Ray of nine nodes that declare eight GPUs each: 22 processes,
  placed by the product, and the same rule holds. They are stand-ins without torch; nothing is loaded or computed.
- All bundles of the whole graph are reserved on a real Ray of 64 such nodes, and an eighth of its actors started there.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayrlhf.actors.placement import largest_first, plan_ppo
from rayrlhf.config import load_config
from rayrlhf.errors import ResourceError
from rayrlhf.weights.buckets import bucket_plan

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

ROOT = Path(__file__).parents[2]
WIDTH, LAYERS = 12288, 96


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    command = [sys.executable, ROOT / "benchmarks" / "large_graph.py", "--nodes=9", "--share=8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=190, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def by_role(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    return {row["role"]: row["gpus_by_node"] for row in rows}


def test_on_paper_the_whole_graph_fills_50_of_64_nodes(graph: dict[str, Any]) -> None:
    assert by_role(graph["full"]) == {
        "policy": [8] * 8,
        "reference": [8] * 8,
        "reward": [8],
        "value": [8],
        "rollout": [8] * 32,  # an engine's eight shards are on one node
    }
    assert sum(row["ranks"] for row in graph["full"]) == 176


@pytest.mark.timeout(500)
@pytest.mark.skipif(psutil.virtual_memory().total < 16 * 2**30, reason="64 nodes of Ray take 8 GiB")
def test_a_real_ray_of_64_nodes_reserves_the_whole_graph_where_the_paper_says(graph: dict[str, Any]) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "large_graph.py", "--nodes=64", "--share=8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=480, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["reserved"]["bundles"] == 176
    assert by_role(found["reserved"]["roles"]) == by_role(graph["full"])


def test_on_a_real_ray_every_role_of_an_eighth_lands_where_the_plan_says(graph: dict[str, Any]) -> None:
    assert by_role(graph["started"]["roles"]) == {
        "policy": [8],
        "reference": [8],
        "reward": [1],
        "value": [1],
        "rollout": [8] * 4,
    }


def test_engines_that_need_a_whole_node_find_one_only_if_they_are_placed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth on seven nodes, 50 of 56 GPUs: reward and value would begin a node each of which an engine needs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("large_graph")
    planned = plan_ppo(load_config(script.CONFIG, script._scaled(8)))
    with pytest.raises(ResourceError, match="rollout: 3 of 4 find room"):
        script.pack(planned, 7)
    assert sorted(map(sum, script.pack(largest_first(planned), 7))) == [1, 1, 8, 8, 32]


def test_all_ranks_load_at_once(graph: dict[str, Any]) -> None:
    """22 of them take a second each."""
    assert 1 <= graph["started"]["loading_s"] < 22 / 2


def test_a_step_runs_and_a_node_that_goes_takes_nothing_with_it(graph: dict[str, Any]) -> None:
    started = graph["started"]
    assert started["replaced"] == ["policy"]
    assert started["steps"] == 5
    assert started["lost"]["policy"] == {"ranks_lost": 8, "ranks_there_again": 8}
    assert by_role(started["roles_after"])["policy"] == [8], "together again, on the node that was free"
    assert sum(lost["ranks_lost"] for lost in started["lost"].values()) == 8


def test_calls_of_a_step_depend_on_buckets_and_not_on_parameters(graph: dict[str, Any]) -> None:
    one, many, three = (graph["started"]["calls"][key] for key in ("1 x 1", "1 x 1000", "3 x 1"))
    for calls in (one, many, three):
        calls.pop("score")  # as often as responses arrive in parts
    assert one == many
    # Two publishes, two buckets more in each: every policy rank is asked for one, every engine is told of one.
    assert {method: three[method] - one.get(method, 0) for method in three if three[method] != one.get(method)} == {
        "next_bucket": 2 * 2 * 8,
        "load_bucket": 2 * 2 * 4,
    }


def test_buckets_of_the_real_model_are_as_many_however_its_layers_are_cut() -> None:
    """175B parameters in bfloat16, a layer as four matrices or as 96 pieces."""
    layer = 12 * WIDTH * WIDTH * 2
    for pieces in (4, 96):
        sizes = [(f"{i}.{j}", layer // pieces) for i in range(LAYERS) for j in range(pieces)]
        assert len(bucket_plan(sizes, 4 * layer)) == LAYERS // 4
