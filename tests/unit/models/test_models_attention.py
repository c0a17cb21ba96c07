"""Which attention is chosen; and that flash attention, stood in for by plain torch, sees where sequences begin."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash

from rayrlhf.config.model import FromScratch
from rayrlhf.errors import ModelError
from rayrlhf.models import attention
from rayrlhf.models.attention import FLASH, SDPA, attention_for, rows_for, use_attention
from rayrlhf.models.build import PolicyModel, checkpoint_activations, from_scratch


def policy(architecture: str = "llama") -> PolicyModel:
    spec = FromScratch(architecture=architecture, hidden_size=16, layers=2, heads=2, context=32, initializer_range=0.3)
    return from_scratch(spec, 40, eos=0, pad=1, seed=1).eval()


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "expected"),
    [
        ("cuda", "bfloat16", True, FLASH),
        ("cuda", "float16", True, FLASH),
        ("cuda", "bfloat16", False, SDPA),
        ("cuda", "float32", True, SDPA),
        ("cpu", "bfloat16", True, SDPA),
    ],
)
def test_flash_attention_is_for_half_precision_on_a_gpu_where_it_is_installed(
    device: str, dtype: str, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_flash_attention_loads", lambda: installed)
    assert attention_for(device, dtype) == expected


def test_a_package_built_for_another_torch_counts_as_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    # None in sys.modules makes the import fail, as a missing symbol would.
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert attention_for("cuda", "bfloat16") == SDPA


@pytest.mark.parametrize(("supported", "expected"), [(True, FLASH), (False, SDPA)])
def test_a_model_is_told_unless_its_architecture_has_no_flash_attention(
    supported: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_flash_attention_loads", lambda: True)
    module = policy()
    told: list[str] = []

    def tell(name: str) -> None:
        told.append(name)
        module.lm.config._attn_implementation_internal = name

    monkeypatch.setattr(type(module.lm), "_supports_flash_attn", supported)
    monkeypatch.setattr(module.lm, "set_attn_implementation", tell)
    assert use_attention(module, "cuda", "bfloat16") == expected
    assert told == ([FLASH] if supported else [])


def test_a_model_on_a_cpu_is_left_as_it_was_loaded() -> None:
    module = policy()
    assert use_attention(module, "cpu", "bfloat16") == SDPA == module.lm.config._attn_implementation


# ---- packed rows -----------------------------------------------------------------------------------------------------


class FakeFlash:
    """flash_attn's two functions in plain torch: causal attention, within each sequence of cu_seqlens."""

    def __init__(self) -> None:
        self.boundaries: list[list[int]] = []
        self.batches: list[int] = []

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **_: Any) -> Tensor:
        """[tokens, heads, head size]"""
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        edges = cu_seqlens_q.tolist()
        self.boundaries.append(edges)
        return torch.cat([_causal(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(edges)])

    def dense(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        """[B, T, heads, head size]"""
        self.batches.append(len(q))
        return torch.stack([_causal(*row) for row in zip(q, k, v, strict=True)])


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeFlash:
    fake = FakeFlash()
    # It looks for a dtype to cast float32 to; the real kernels are only asked for half precision.
    monkeypatch.setattr("transformers.integrations.flash_attention.get_target_dtype", lambda *_: None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (fake.dense, fake.varlen, None, None, None))
    names = ("fn", "varlen_fn", "with_kvcache_fn")
    for name in ("_loaded_implementation", *(f"_flash_{n}" for n in names), "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(flash, name, None)
    for name in ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(flash, name, None)
    return fake


# Two rows of six: sequences of 4 and 2 tokens; of 3 and 2, and one of padding.
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 0]])
POSITION_IDS = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 0]])
# Of every token but the first of its sequence.
ASKED = torch.tensor([1, 2, 3, 5, 7, 8, 10])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_packed_rows_are_told_apart_under_flash_attention_as_under_sdpa(architecture: str, fake: FakeFlash) -> None:
    module = policy(architecture)
    expected = module(tokens=TOKENS, positions=ASKED, position_ids=POSITION_IDS)
    module.lm.config._attn_implementation_internal = FLASH
    got = module(tokens=TOKENS, positions=ASKED, position_ids=POSITION_IDS)
    assert fake.boundaries == [[0, 4, 6, 9, 11, 12]] * 2  # once a layer
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_padded_rows_stay_rows_under_flash_attention(fake: FakeFlash) -> None:
    module = policy()
    expected = module(tokens=TOKENS, positions=ASKED)
    module.lm.config._attn_implementation_internal = FLASH
    got = module(tokens=TOKENS, positions=ASKED)
    assert (fake.batches, fake.boundaries) == ([2, 2], [])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_several_packed_rows_would_be_attended_across_if_they_stayed_rows(fake: FakeFlash) -> None:
    """What `rows_for` is for: transformers looks for boundaries in a batch of one row only."""
    module = policy()
    expected = module(tokens=TOKENS, positions=ASKED, position_ids=POSITION_IDS)
    module.lm.config._attn_implementation_internal = FLASH
    hidden = module.lm.base_model(input_ids=TOKENS, position_ids=POSITION_IDS, use_cache=False).last_hidden_state
    logits = module.lm.get_output_embeddings()(hidden.reshape(-1, 16)[ASKED - 1])
    across = logits.log_softmax(-1).gather(-1, TOKENS.reshape(-1)[ASKED, None]).squeeze(-1)
    assert (across - expected).abs().max().item() > 0.01


def test_rows_are_left_alone_without_flash_attention_or_without_packing() -> None:
    lm = policy().lm
    assert rows_for(lm, TOKENS, POSITION_IDS)[0].shape == (2, 6)
    lm.config._attn_implementation_internal = FLASH
    assert rows_for(lm, TOKENS, None)[0].shape == (2, 6)
    tokens, position_ids = rows_for(lm, TOKENS, POSITION_IDS)
    assert position_ids is not None
    assert (tokens.shape, position_ids.shape) == ((1, 12), (1, 12))


def test_the_choice_is_not_saved_with_the_model() -> None:
    lm = policy().lm
    lm.config._attn_implementation_internal = FLASH
    assert not [key for key in lm.config.to_dict() if "attn_impl" in key]


# ---- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_checkpointed_activations_are_computed_twice_and_the_gradients_are_the_same(architecture: str) -> None:
    runs = {}
    for checkpointed in (False, True):
        module = policy(architecture).train()
        if checkpointed:
            checkpoint_activations(module)
        layers = module.lm.model.layers if architecture == "llama" else module.lm.transformer.h
        calls: list[int] = []
        layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        module(tokens=TOKENS, positions=ASKED, position_ids=POSITION_IDS).sum().backward()
        runs[checkpointed] = len(calls), [p.grad for p in module.parameters()]
    assert (runs[False][0], runs[True][0]) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(runs[False][1], runs[True][1], strict=True))


def test_a_model_that_is_only_run_keeps_nothing_and_computes_once() -> None:
    module = policy()
    checkpoint_activations(module)
    calls: list[int] = []
    module.lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        module(tokens=TOKENS, positions=ASKED)
    assert calls == [1]


def test_an_architecture_without_checkpointing_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = policy()
    monkeypatch.setattr(type(module.lm), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match="llama model does not support activation checkpointing") as caught:
        checkpoint_activations(module)
    assert caught.value.hint == "set deepspeed.activation_checkpointing=false"
