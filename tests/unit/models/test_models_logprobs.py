"""Log-probs of tokens: whole or in chunks, they are the float64 ones, and so are their gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.models import logprobs
from rayrlhf.models.logprobs import token_logprobs

V = 13


def reference(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> np.ndarray:
    rows = logits.detach().double().numpy() / temperature
    logsumexp = [row.max() + np.log(np.exp(row - row.max()).sum()) for row in rows]
    return rows[np.arange(len(rows)), targets] - logsumexp


def reference_gradient(logits: torch.Tensor, targets: torch.Tensor, temperature: float, weights) -> np.ndarray:
    """d/dlogits of sum_n w_n logprob_n = w_n (onehot - softmax) / temperature."""
    rows = logits.detach().double().numpy() / temperature
    softmax = np.exp(rows - rows.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    return weights[:, None] * (np.eye(V)[targets] - softmax) / temperature


def draw(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(n, V, generator=generator)).requires_grad_()
    return logits, torch.randint(V, (n,), generator=generator), torch.randn(n, generator=generator)


@pytest.mark.parametrize("entries", [2**26, 5 * V, V, 1], ids=["whole", "5 rows", "1 row", "less than a row"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("n", [1, 5, 11])
def test_values_and_gradients_equal_float64_in_chunks_or_whole(monkeypatch, entries, temperature, n):
    monkeypatch.setattr(logprobs, "CHUNK_ENTRIES", entries)
    logits, targets, weights = draw(n)
    values = token_logprobs(logits, targets, temperature)
    assert values.dtype == torch.float32
    assert values.shape == (n,)
    np.testing.assert_allclose(values.detach(), reference(logits, targets, temperature), atol=3e-6)
    (values * weights).sum().backward()
    expected = reference_gradient(logits, targets, temperature, weights.numpy().astype(float))
    np.testing.assert_allclose(logits.grad, expected, atol=3e-6)


@given(st.integers(1, 30), st.integers(1, 12 * V), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_any_chunk_size_gives_the_same_numbers(n, entries, seed):
    logits, targets, _ = draw(n, seed)
    whole = token_logprobs(logits, targets, 0.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CHUNK_ENTRIES", entries)
        assert torch.allclose(token_logprobs(logits, targets, 0.7), whole, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_raised_to_float32_first(monkeypatch, dtype):
    monkeypatch.setattr(logprobs, "CHUNK_ENTRIES", 2 * V)
    logits, targets, _ = draw(7)
    half = logits.detach().to(dtype).requires_grad_()
    values = token_logprobs(half, targets, 0.7)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values.detach(), reference(half, targets, 0.7), atol=3e-6)
    values.sum().backward()
    assert half.grad.dtype == dtype


def test_huge_logits_neither_overflow_nor_vanish():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e30, -1e30, 0.0]])
    values = token_logprobs(logits, torch.tensor([0, 2]))
    assert values.tolist() == [0.0, 0.0]
    assert token_logprobs(logits, torch.tensor([1, 2])).tolist() == [-1e4, 0.0]


def test_no_tokens_give_no_logprobs():
    values = token_logprobs(torch.zeros(0, V, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    assert values.shape == (0,)
    values.sum().backward()
