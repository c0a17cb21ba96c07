"""Log-probs of given tokens from logits, in chunks, so that no second [N, V] float32 copy is ever held."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

__all__ = ["token_logprobs"]

# Logits of one chunk in float32: 2**26 entries are 256 MiB.
CHUNK_ENTRIES = 2**26


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the targets, computed in float32.

    Args:
        logits: [N, V] in any float dtype.
        targets: int64 [N].

    Returns:
        float32 [N].
    """
    rows = max(1, CHUNK_ENTRIES // logits.shape[-1])
    if logits.shape[0] <= rows:
        return _chunk(logits, targets, temperature)
    parts = [
        # Recomputed in the backward pass, else autograd would keep every chunk's float32 softmax.
        checkpoint(_chunk, chunk, target, temperature, use_reentrant=False)
        for chunk, target in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.cat(parts)


def _chunk(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    scaled = logits.float()
    if temperature != 1.0:
        scaled = scaled / temperature
    return -cross_entropy(scaled, targets, reduction="none")
