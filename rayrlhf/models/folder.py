"""What a model's folder may hold: weights in safetensors, which are numbers and names and nothing that runs.

Pickled weights (`pytorch_model.bin`, `.pt`, ...) are refused, though torch can read them with `weights_only`: that is a
list of what a pickle may call, and lists have had holes. Whoever trusts such a file converts it once.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rayrlhf.errors import ModelError

__all__ = ["check_weights"]

WHOLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
CONVERT = (
    'if you trust it, convert it once: python -c "from transformers import AutoModelForCausalLM as Model; '
    "Model.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\" (a reward model with "
    "AutoModelForSequenceClassification), copy the tokenizer's files beside it, and name that folder"
)


def check_weights(path: str) -> None:
    """The folder's weights are whole safetensors files of its own. A hub name is checked by those that load it.

    Raises:
        ModelError: naming the file and the cure.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if (folder / ADAPTER).exists():
        raise ModelError(
            f"{folder / ADAPTER}: an adapter, which names another model to load it into",
            "merge it into its base model (peft's merge_and_unload), save that, and name its folder",
        )
    if not (folder / WHOLE).is_file():
        if not (folder / INDEX).is_file():
            raise _without_safetensors(folder)
        for shard in _shards(folder / INDEX):
            if not (folder / shard).is_file():
                raise ModelError(f"{folder / shard} is missing: {INDEX} names it", "fetch or save the model again")
    for file in sorted(folder.glob("*.safetensors")):  # vLLM reads all that are there
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file}: not a safetensors file: {error}",
                "fetch or save the model again; a file of another kind does not become safe by its name",
            ) from None


def _without_safetensors(folder: Path) -> ModelError:
    pickled = sorted(p.name for p in folder.iterdir() if p.name.endswith(PICKLED) and p.is_file())
    if not pickled:
        return ModelError(f"{folder}: holds no weights ({WHOLE}, or {INDEX} and its shards)", "check the folder")
    return ModelError(
        f"{folder / pickled[0]}: pickled weights, which may run code when they are read; only safetensors are",
        CONVERT.format(folder=folder),
    )


def _shards(index: Path) -> list[str]:
    """The files that an index names, each of its own folder."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted({str(name) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: cannot be read as an index of weights: {error}", "fetch the model again") from None
    for name in shards:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index}: names {name!r}, expected a .safetensors file beside it", "fetch or save the model again"
            )
    return shards
