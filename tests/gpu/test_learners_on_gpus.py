"""Learners on one GPU or several against the same training by plain torch on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.gpu import runs

Found = list[dict[str, Any]]
FLOAT32 = [name for name, (dtype, *_) in runs.CASES.items() if dtype == "float32"]
BFLOAT16 = [name for name, (dtype, *_) in runs.CASES.items() if dtype == "bfloat16"]


@pytest.fixture(scope="module")
def expected() -> dict[float, Any]:
    """By the largest gradient norm; 0 does not clip."""
    return {clip: runs.on_the_cpu(clip) for clip in (runs.CLIP, 0.0)}


def losses(found: Found, name: str) -> list[float]:
    """Over all ranks, by step."""
    return [sum(rank[name]["steps"][step]["loss"] for rank in found) for step in range(runs.STEPS)]


@pytest.mark.parametrize("name", FLOAT32)
def test_in_float32_losses_norms_and_weights_are_those_of_the_cpu(
    name: str, found: Found, expected: dict[float, Any]
) -> None:
    """Fused AdamW, clipping, every ZeRO stage, checkpointing and offloading at once: one right answer."""
    weights, steps = expected[runs.CASES[name][2]]
    for got, want in zip(losses(found, name), steps, strict=True):
        assert got == pytest.approx(want["loss"], rel=1e-4)
    for rank in found:
        for got, want in zip(rank[name]["steps"], steps, strict=True):
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)
        for key, tensor in weights.items():
            assert (rank[name]["weights"][key] - tensor).abs().max().item() < 0.05 * runs.RATE, key


@pytest.mark.parametrize("name", BFLOAT16)
def test_in_bfloat16_a_step_is_finite_and_close_to_float32(name: str, found: Found, expected: dict[float, Any]) -> None:
    weights, steps = expected[runs.CLIP]
    for got, want in zip(losses(found, name), steps, strict=True):
        assert math.isfinite(got)
        assert got == pytest.approx(want["loss"], rel=0.02)
    assert found[0][name]["steps"][0]["grad_norm"] == pytest.approx(steps[0]["grad_norm"], rel=0.05)
    for key, tensor in weights.items():
        # Three steps of one learning rate each way, and what bfloat16 keeps of a weight: eight bits.
        gap = (found[0][name]["weights"][key] - tensor).abs().max().item()
        assert gap < 2 * runs.STEPS * runs.RATE + tensor.abs().max().item() / 256, key


def test_the_gradients_that_are_compared_are_clipped_and_it_matters(found: Found) -> None:
    clipped, free = (found[0][name] for name in ("float32_1", "unclipped_1"))
    assert all(step["grad_norm"] > runs.CLIP for step in clipped["steps"])
    assert any(not (clipped["weights"][key] == free["weights"][key]).all() for key in clipped["weights"])


@pytest.mark.parametrize("name", runs.CASES)
def test_the_optimizer_is_torchs_fused_one(name: str, found: Found) -> None:
    assert found[0][name]["fused"] is True


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_sequences_that_share_a_row_do_not_see_each_other(dtype: str, allowed: float, found: Found) -> None:
    for rank in found:
        got = rank[f"attention_{dtype}"]
        gaps = [abs(a - b) for a, b in zip(got["packed"], got["padded"], strict=True)]
        assert max(gaps) < allowed


def test_flash_attention_is_used_in_bfloat16_and_packed_rows_equal_padded_ones(found: Found) -> None:
    pytest.importorskip("flash_attn", reason="the package flash_attn is not installed: sdpa was used")
    assert found[0]["attention_bfloat16"]["attention"] == "flash_attention_2"
    assert found[0]["bfloat16_1"]["attention"] == "flash_attention_2"
    assert found[0]["attention_float32"]["attention"] == "sdpa"


def test_every_rank_sees_one_gpu_and_nccl_adds_up_over_them(found: Found, world: int) -> None:
    for rank in found:
        reduced = rank["reduced"]
        assert reduced["visible"] == 1
        assert reduced["sum"][0] == world * (world + 1) / 2
        assert reduced["sum"][1] == pytest.approx(1e-17 * world * world)
        assert reduced["max"] == world - 1
        assert reduced["means"]["a"] == (world - 1) / 2
        assert math.isnan(reduced["means"]["b"])
