"""What a config asks of the nodes: paths, names and room, in plain values that can be sent to them."""

from __future__ import annotations

import json
from pathlib import Path

from rayrlhf.config import Config
from rayrlhf.config.data import SOURCE_FIELDS
from rayrlhf.launch.doctor.facts import Wanted

__all__ = ["checkpoints_gib", "wanted", "why_no_data", "why_no_models"]

# float32: the weights as they are published, and the optimizer's own with Adam's two moments.
CHECKPOINT_BYTES, MODEL_BYTES = 16, 4
HALVES = ("bfloat16", "float16")


def wanted(config: Config) -> Wanted:
    models = {
        "model.path": config.model.path,
        "sft.path": config.sft.path,
        "reward.path": config.reward.path,
        "sft.select.reward_model": config.sft.select.reward_model,
        "eval.reward_model": config.eval.reward_model,
        **{f"ppo.reward.models[{i}]": name for i, name in enumerate(config.ppo.reward.models)},
    }
    return Wanted(
        output=str(config.run.output.absolute()),
        models={key: _absolute(name) for key, name in models.items() if name is not None},
        data={f"data.{name}": sources for name in SOURCE_FIELDS if (sources := getattr(config.data, name))},
        data_root=str((config.data.root or Path()).absolute()),
    )


def why_no_models(config: Config) -> str:
    return "" if wanted(config).models else "model.from_scratch: the run makes its own"


def why_no_data(config: Config) -> str:
    if wanted(config).data:
        return ""
    return f"world {config.world.name} writes it" if config.world.name else "the config names none"


def checkpoints_gib(config: Config) -> float | None:
    """About what a run leaves on the disk at a time; None where the model's size is not known before it is loaded."""
    parameters = _parameters(config)
    if parameters is None:
        return None
    stages, keep = config.stages(), config.checkpoint
    # One more than stay: the next is written before the oldest goes. Policy and value learn.
    count = keep.keep + keep.keep_best + 1 if "ppo" in stages and keep.every else 0
    return parameters * (2 * count * CHECKPOINT_BYTES + (len(stages) + 1) * MODEL_BYTES) / 2**30


def _parameters(config: Config) -> int | None:
    shape = config.model.from_scratch
    if shape is not None:
        hidden, matrices = shape.hidden_size, 3 if shape.architecture == "llama" else 2
        inner = shape.intermediate_size or round(hidden * 8 / matrices)
        layer = 4 * hidden**2 + matrices * hidden * inner
        return shape.vocab_size * hidden * (1 if shape.tie_embeddings else 2) + shape.layers * layer
    folder = Path(config.model.path or "").expanduser()
    files = list(folder.glob("*.safetensors")) if config.model.path and folder.is_dir() else []
    if not files:
        return None
    return sum(file.stat().st_size for file in files) // (2 if _dtype(folder) in HALVES else 4)


def _dtype(folder: Path) -> str:
    try:
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(shape.get("dtype") or shape.get("torch_dtype"))
    except (OSError, ValueError, AttributeError):
        return ""  # what is wrong with it is said by another check


def _absolute(name: str) -> str:
    """A folder by its full path; a Hugging Face name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() or name.startswith(("/", ".", "~")) else name
