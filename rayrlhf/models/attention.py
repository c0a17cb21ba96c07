"""Which attention kernels a model runs on, and what they ask of packed rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.utils import is_flash_attn_2_available

if TYPE_CHECKING:  # see build.py
    from transformers import PreTrainedModel

__all__ = ["FLASH", "SDPA", "attention_for", "rows_for", "use_attention"]

FLASH, SDPA = "flash_attention_2", "sdpa"
"""transformers' names"""


def attention_for(device: str, dtype: str) -> str:
    """`FLASH` on a GPU in half precision where the package flash_attn is installed and loads, else `SDPA`.

    flash_attn computes each sequence of a packed row for itself; sdpa computes whole rows under a mask, which costs
    what a single sequence of the row's length would.
    """
    half = dtype in ("bfloat16", "float16")
    return FLASH if device == "cuda" and half and _flash_attention_loads() else SDPA


def use_attention(module: nn.Module, device: str, dtype: str) -> str:
    """Let the Hugging Face model inside `module` attend as `attention_for` says, if it can; what it does then."""
    from transformers import PreTrainedModel

    wanted, found = attention_for(device, dtype), SDPA
    for model in module.children():
        if isinstance(model, PreTrainedModel):
            if wanted == FLASH and model._supports_flash_attn:
                model.set_attn_implementation(FLASH)
            found = str(model.config._attn_implementation)
    return found


def rows_for(model: PreTrainedModel, tokens: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[B, T] of tokens and position ids as the model's attention takes them: flash_attn in one row [1, B * T].

    transformers finds the beginnings of sequences, position 0, in a batch of one row only, and would otherwise attend
    across them. The hidden states are read by flat positions, which stay what they are.
    """
    if position_ids is None or model.config._attn_implementation != FLASH:
        return tokens, position_ids
    return tokens.reshape(1, -1), position_ids.reshape(1, -1)


def _flash_attention_loads() -> bool:
    if not is_flash_attn_2_available():
        return False
    try:
        import flash_attn  # noqa: F401
    except (ImportError, OSError):  # built for another torch
        return False
    return True
