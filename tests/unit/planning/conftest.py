"""Shapes and workloads of round numbers, to be worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rayrlhf.planning.shapes import ModelShape
from rayrlhf.planning.workload import Role, Workload


@pytest.fixture
def shape() -> ModelShape:
    """2 layers of width 10, a vocabulary of 100: 1,000 + 7,990 + 10 = 9,000 parameters, the head tied."""
    return ModelShape(
        name="round",
        hidden=10,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=5,
        vocab=100,
        context=64,
        embeddings=1000,
        in_layers=7990,
        multiplied=7000,
        final=10,
        head=1000,
        tied=True,
        largest_layer=3995,
        largest_tensor=1000,
        mlp_width=30,
        gated=True,
        rms_norm=True,
    )


@pytest.fixture
def workload(shape: ModelShape) -> Callable[..., Workload]:
    """8 responses of 6 tokens to prompts of 4, two minibatches; `roles` replaces roles by name."""

    def make(roles: dict[str, Role] | None = None, **changes: Any) -> Workload:
        made = {
            "policy": Role("policy", shape, 1, learns=True, zero_stage=1),
            "reference": Role("reference", shape, 1),
            "reward": Role("reward", shape.as_scalar(), 1),
            "value": Role("value", shape.as_scalar(), 1, learns=True, zero_stage=1),
            "rollout": Role("rollout", shape, 1),
        }
        values: dict[str, Any] = {
            "dtype": "bfloat16",
            "gpu": True,
            "steps": 10,
            "batch_size": 8,
            "minibatch_size": 4,
            "epochs": 1,
            "prompt_tokens": 4.0,
            "longest_prompt": 4,
            "response_tokens": 6.0,
            "longest_response": 6,
            "response_spread": 0.0,
            "micro_batch_tokens": 20,
            "transport": "nccl",
            "bucket_bytes": 4_000,
        }
        return Workload(roles={**made, **(roles or {})}, **{**values, **changes})

    return make
