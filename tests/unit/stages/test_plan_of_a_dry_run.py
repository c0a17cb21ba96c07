"""What `--dry-run` plans: supervised stages too, and on the GPUs that this machine has."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from rayrlhf.actors.cluster import NodeResources, _node
from rayrlhf.config import Config, config_from
from rayrlhf.errors import ResourceError
from rayrlhf.stages import plan
from rayrlhf.stages.plan import show_and_check


def config(stages: list[str], *overrides: str) -> Config:
    tree = {
        "model": {"path": "meta-llama/Llama-2-70b-hf", "dtype": "bfloat16"},
        "data": {"prompts": ["p"], "demonstrations": ["d"], "rankings": ["r"], "max_prompt_tokens": 512},
        "run": {"stages": stages},
        "cluster": {"device": "cuda", "train": {"ranks": 8}},
        "rollout": {"max_tokens": 512},
    }
    return config_from(tree, overrides, {})


def shown(run: Config) -> str:
    stream = io.StringIO()
    show_and_check(Console(file=stream, width=200), run)
    return stream.getvalue()


def with_gpus(monkeypatch: pytest.MonkeyPatch, name: str, gib: float, count: int) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    properties = SimpleNamespace(name=name, total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_supervised_stage_that_cannot_fit_is_refused(stage: str) -> None:
    """70 billion parameters: 2 bytes of weights and 2 of gradients on each rank alone are 257 GiB."""
    with pytest.raises(ResourceError, match=r"this does not fit: train: \d+\.\d GiB a GPU") as error:
        shown(config([stage], f"{stage}.zero_stage=1"))
    assert "cluster.train.ranks=" in error.value.hint


def test_a_supervised_stage_that_fits_shows_its_workers_and_no_roles_of_ppo() -> None:
    text = shown(config(["sft"], "model.path=facebook/opt-350m"))
    assert "train" in text
    assert "policy" not in text


def test_a_model_that_the_plan_does_not_know_is_no_reason_to_refuse_the_run() -> None:
    text = shown(config(["sft"], "plan.shapes={policy: {model_type: brand_new}}"))
    assert "no plan, and no check that it fits" in text
    assert "brand_new" in text


def test_a_gpu_that_the_table_lacks_is_judged_by_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = config(["sft"], "model.path=meta-llama/Llama-2-7b-hf", "sft.zero_stage=3")
    monkeypatch.setattr("rayrlhf.planning.hardware._memory_here_gib", lambda: 256.0)
    with_gpus(monkeypatch, "NVIDIA H100 80GB HBM3", 79.1, 8)
    assert "train" in shown(small)
    with_gpus(monkeypatch, "NVIDIA GeForce RTX 4090", 23.6, 8)
    with pytest.raises(ResourceError, match=r"more than the 22\.4 usable of NVIDIA GeForce RTX 4090"):
        shown(small)


def test_more_gpus_than_this_machine_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(["ppo"], "model.path=facebook/opt-350m")
    with_gpus(monkeypatch, "NVIDIA H100 80GB HBM3", 79.1, 8)
    assert "GPU-hours" in shown(run)
    with_gpus(monkeypatch, "NVIDIA H100 80GB HBM3", 79.1, 1)
    with pytest.raises(ResourceError, match="the roles take 5 GPUs, 1 node of 1 have 1") as error:
        shown(run)
    assert "cluster.shared=" in error.value.hint


# What Ray says of a node with eight H100 and 2 TiB, of which it keeps 200 GB for objects.
RAYS = {
    "CPU": 192.0,
    "GPU": 8.0,
    "memory": 1.8e12,
    "object_store_memory": 2.0e11,
    "accelerator_type:H100": 1.0,
    "node:10.0.0.1": 1.0,
}


def on_cluster(monkeypatch: pytest.MonkeyPatch, *nodes: NodeResources) -> list[str]:
    asked: list[str] = []

    def nodes_of(address: str) -> list[NodeResources]:
        asked.append(address)
        if not nodes:
            raise ResourceError(f"cluster.address {address}: no Ray cluster answers")
        return list(nodes)

    monkeypatch.setattr(plan, "nodes_of", nodes_of)
    return asked


def test_what_ray_says_of_a_node_is_understood() -> None:
    assert _node(RAYS) == NodeResources(8, "H100", 2e12 / 2**30)
    assert _node({"CPU": 4.0}) == NodeResources(0, None, 0.0)
    assert _node({**RAYS, "accelerator_type:H100-80G": 1.0}).gpu_kind == "H100-80G"


def test_the_plan_is_for_the_cluster_that_the_run_would_join(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(["ppo"], "model.path=facebook/opt-350m", "cluster.address=10.0.0.1:6379")
    head, node = NodeResources(0, None, 60.0), NodeResources(4, "H100", 500.0)
    assert on_cluster(monkeypatch, head, node, node) is not None
    text = shown(run)
    assert "H100 of the cluster" in text
    assert "(2 nodes)" in text
    on_cluster(monkeypatch, head, NodeResources(4, "H100", 500.0))
    with pytest.raises(ResourceError, match="the roles take 5 GPUs, 1 node of 4 have 4"):
        shown(run)


@pytest.mark.parametrize(
    ("title", "memory", "name"),
    [
        ("A100-40G", None, "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", None, "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40g"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80g"),
        ("H200", None, "h200-141g"),
        ("A100", None, None),
        ("NVIDIA GH200 480GB", 94.5, None),
    ],
)
def test_a_gpu_is_found_in_the_table_by_its_whole_name(title: str, memory: float | None, name: str | None) -> None:
    assert plan._known(title, memory) == name


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ([], "no Ray cluster answers"),
        ([NodeResources(8, "H100", 1e3), NodeResources(8, "A100", 1e3)], "GPUs of 8 x A100, 8 x H100"),
        ([NodeResources(8, None, 1e3)], "its GPUs are of unknown kind, which the table lacks"),
        ([NodeResources(0, None, 1e3)], "its nodes have GPUs of none"),
        ([NodeResources(8, "A100", 1e3)], "its GPUs are A100, of 40 or 80 GB"),
        ([NodeResources(8, "GH200", 1e3)], "its GPUs are GH200, which the table lacks"),
    ],
)
def test_a_cluster_that_cannot_be_judged_is_said_and_the_plan_shown_all_the_same(
    nodes: list[NodeResources], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cluster(monkeypatch, *nodes)
    text = shown(config(["ppo"], "model.path=facebook/opt-350m", "cluster.address=10.0.0.1:6379"))
    assert "not checked against the cluster: " in text
    assert why in text
    assert "GPU-hours" in text


def on_cpus(*overrides: str) -> Config:
    tree = {
        "model": {"path": "facebook/opt-1.3b"},
        "data": {"prompts": ["p"], "max_prompt_tokens": 64},
        "run": {"stages": ["ppo"]},
        "cluster": {"device": "cpu", "address": "10.0.0.1:6379"},
        "rollout": {"max_tokens": 64},
    }
    return config_from(tree, overrides, {})


def test_without_gpus_the_memory_of_all_the_clusters_nodes_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients and Adam of two learners alone are 16 bytes of 1.3 billion parameters each: 39 GiB."""
    on_cluster(monkeypatch, NodeResources(0, None, 20.0), NodeResources(0, None, 20.0))
    with pytest.raises(ResourceError, match=r"more than the cluster's 40\.0"):
        shown(on_cpus())
    on_cluster(monkeypatch, *[NodeResources(0, None, 100.0)] * 2)
    assert "ppo alone" in shown(on_cpus())


def test_a_cluster_without_gpus_that_does_not_answer_is_not_judged_by_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_cluster(monkeypatch)
    text = shown(on_cpus("model.path=facebook/opt-13b"))
    assert "not checked against the cluster: cluster.address 10.0.0.1:6379: no Ray cluster answers" in text
