"""What differs on a GPU, decided without one: copies, the optimizer's kernels, the backend, what is handed on."""

from __future__ import annotations

import os
import socket
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from rayrlhf.data.batching import Cutting
from rayrlhf.engines import distributed
from rayrlhf.engines.batches import last_tokens, lay_out, spans, to_device
from rayrlhf.engines.deepspeed import LearnerSettings, _learner_config

GPU = torch.device("cuda", 0)


class FakeTensor:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def pin_memory(self) -> FakeTensor:
        self.calls.append("pin_memory")
        return self

    def to(self, device: torch.device, **more: Any) -> FakeTensor:
        self.calls.append((device, more))
        return self


def settings(**more: Any) -> LearnerSettings:
    given: dict[str, Any] = {
        "zero_stage": 2,
        "dtype": "float32",
        "device": "cpu",
        "learning_rate": 1e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "grad_clip": 1.5,
        "max_loss": 1e4,
        "failed_folder": "failed",
        "role": "policy",
    }
    return LearnerSettings(**(given | more))


def test_a_copy_to_a_gpu_comes_from_pinned_memory_and_is_not_waited_for() -> None:
    tensor = FakeTensor()
    to_device(tensor, GPU)  # type: ignore[arg-type]
    assert tensor.calls == ["pin_memory", (GPU, {"non_blocking": True})]


def test_on_a_cpu_nothing_is_pinned_or_copied() -> None:
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


def test_the_beginnings_of_sequences_stay_on_the_host_so_that_no_position_waits_for_the_gpu() -> None:
    # "meta" stands for any device that is not the host.
    layout = lay_out([[np.arange(2, 7)], [np.arange(2, 4)]], Cutting(9, packed=False), torch.device("meta"))
    assert {one.tokens.device.type for one in layout} == {"meta"}
    assert {one.starts.device.type for one in layout} == {"cpu"}
    assert spans(layout[0], [1], [5]).device.type == last_tokens(layout[0], [5]).device.type == "meta"


def test_adam_is_torchs_and_fused_on_a_gpu() -> None:
    optimizer = _learner_config(settings(device="cuda"), 2)["optimizer"]
    assert optimizer == {
        "type": "AdamW",
        "params": {
            "torch_adam": True,
            "fused": True,
            "lr": 1e-3,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.1,
        },
    }
    assert "fused" not in _learner_config(settings(), 2)["optimizer"]["params"]


def test_torchs_adamw_takes_what_deepspeed_hands_on_to_it() -> None:
    params = _learner_config(settings(device="cuda"), 2)["optimizer"]["params"]
    handed_on = {k: v for k, v in params.items() if k != "torch_adam"}
    optimizer = torch.optim.AdamW([torch.ones(1, requires_grad=True)], **handed_on)
    assert {k: optimizer.defaults[k] for k in handed_on} == handed_on | {"betas": (0.9, 0.95)}
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.ones(1)
    optimizer.step()
    # Loshchilov and Hutter 2019, alg. 2: the weight decays by lr * 0.1; Adam's first step is lr * g / (|g| + eps).
    assert float(weight.detach()) == pytest.approx(1 - 1e-3 * 0.1 - 1e-3, abs=1e-8)


def test_the_users_keys_join_the_learners_own() -> None:
    more = {"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": True}}
    config = _learner_config(settings(deepspeed=more), 2)
    assert config["zero_optimization"] == {"overlap_comm": True, "stage": 2}
    assert config["wall_clock_breakdown"] is True
    assert config["gradient_clipping"] == 1.5
    assert more == {"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": True}}


def test_bfloat16_is_asked_of_deepspeed_and_gradients_that_add_up_in_float32_unless_the_user_says_otherwise() -> None:
    config = _learner_config(settings(dtype="bfloat16"), 2)
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    small = {"data_types": {"grad_accum_dtype": "bf16"}}
    assert _learner_config(settings(dtype="bfloat16", deepspeed=small), 2)["data_types"] == small["data_types"]


@pytest.mark.parametrize(("device", "backend"), [("cuda", "nccl"), ("cpu", "gloo")])
def test_gpus_talk_over_nccl_and_cpus_over_gloo_and_rank_0_listens_where_the_others_look_for_it_alone(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    asked: list[str] = []
    stores: list[Any] = []

    def init_process_group(backend: str, store: Any, **_: Any) -> None:
        asked.append(backend)
        stores.append(store)

    monkeypatch.setattr(distributed, "prepare_process", lambda *_: None)
    monkeypatch.setattr(distributed.dist, "init_process_group", init_process_group)
    monkeypatch.setattr("deepspeed.init_distributed", lambda dist_backend, verbose: asked.append(dist_backend))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "as it was")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    distributed.join_process_group(distributed.Rendezvous(0, 1, "127.0.0.1", port, device, 1, deterministic=False))
    assert asked == [backend, backend]
    connections = psutil.Process().net_connections("inet")
    assert [c.laddr.ip for c in connections if c.status == "LISTEN" and c.laddr.port == port] == ["127.0.0.1"]
    assert stores[0].port == port


def test_where_a_group_is_to_meet_is_nobody_elses_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    stores: list[Any] = []
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, store, **__: stores.append(store))
    monkeypatch.setattr("deepspeed.init_distributed", lambda dist_backend, verbose: None)
    address, port = distributed.listen("127.0.0.1")
    with pytest.raises(OSError, match="in use"):
        socket.create_server((address, port))
    distributed.form_group(distributed.Rendezvous(0, 1, address, port, "cpu", 1, deterministic=False))
    assert stores[0].port == port


def test_a_deterministic_process_says_so_to_cublas_and_to_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "unset")
    try:
        distributed.prepare_process("cuda", 1, deterministic=True)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
