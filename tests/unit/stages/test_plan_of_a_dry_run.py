"""What `--dry-run` plans: supervised stages too, and on the GPUs that this machine has."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from rayrlhf.config import Config, config_from
from rayrlhf.errors import ResourceError
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
