"""What a step that was stopped had in its hands, for whoever looks into it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rayrlhf.checkpoint.disk import write_whole

__all__ = ["write_tensors"]


def write_tensors(
    folder: Path, name: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> tuple[Path, str]:
    """Write `<folder>/<name>.safetensors`, and the description to `<name>.json` beside it.

    Each file appears whole or not at all. Nothing is raised: a full disk must not hide the error that led here, nor
    leave the other ranks waiting.

    Returns:
        The path of the tensors, and what went wrong ("" when both files are there).
    """
    path = folder / f"{name}.safetensors"
    try:
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        # Copies: safetensors takes neither views nor two names of the same memory.
        write_whole(path, save({key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}))
        text = json.dumps(_plain(description), indent=2, ensure_ascii=False)
        write_whole(path.with_suffix(".json"), text.encode())
    except Exception as error:
        return path, f"{type(error).__name__}: {error}"
    return path, ""


def _plain(value: Any) -> Any:
    """As JSON takes it: it has no NaN, so numbers that are not finite become words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
