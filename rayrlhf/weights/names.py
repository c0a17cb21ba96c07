"""Which names the trainer sends: Hugging Face checkpoint names, tied heads under both of theirs."""

from __future__ import annotations

import torch

__all__ = ["publish_names"]


def publish_names(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) in module order, one entry per name even where two names share a parameter.

    A tied head shares its parameter with the embedding. An engine that packs its head for fast products keeps a
    copy of it, and that copy stays old, silently, unless the head is sent under its own name too.
    """
    return list(module.named_parameters(remove_duplicate=False))
