"""Where a model's shape is read: models.yaml, a folder or file with a Hugging Face config, or the hub's config.json."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from rayrlhf.config.load import read_yaml
from rayrlhf.errors import ModelError
from rayrlhf.planning.shapes import ModelShape, shape_of

__all__ = ["known_models", "shape_named"]


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """The Hugging Face configs of models.yaml by name."""
    return read_yaml(Path(str(files("rayrlhf.planning").joinpath("models.yaml"))))


def shape_named(source: str | Mapping[str, Any], what: str) -> ModelShape:
    """The shape of a model.

    Args:
        source: a name in models.yaml, a folder with config.json, a JSON file, a hub name `org/name`, or
            a config's keys.
        what: what messages call it, such as the config key.

    Raises:
        ModelError: there is no such config, or one of an architecture that the plan does not know.
    """
    if not isinstance(source, str):
        return shape_of(source, what)
    path = Path(source).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return shape_of(_read(file, what), source)
    known = known_models()
    if source in known:
        return shape_of(known[source], source)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return shape_of(_read(_from_hub(source, what), what), source)
    short = {name.rpartition("/")[2].lower(): name for name in known}
    near = difflib.get_close_matches(source.lower(), [*known, *short], n=1, cutoff=0.5)
    hint = f"did you mean {short.get(near[0], near[0])}?" if near else f"one of {', '.join(known)}"
    there = "a folder without config.json" if path.is_dir() else "no such folder, file or known model"
    raise ModelError(f"{what}: {source}: {there}", f"{hint} Or give {_shape_for(what)}")


def _shape_for(what: str) -> str:
    """How a model's shape is told in place of its name."""
    if what.startswith("workload."):
        return f"the keys of a Hugging Face config as {what} ({{model_type: llama, hidden_size: ...}})"
    return "its shape in plan.shapes"


def _read(file: Path, what: str) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{what}: {file} is not a Hugging Face config: {error}") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{what}: {file} is not a Hugging Face config: a {type(tree).__name__}")
    return tree


def _from_hub(name: str, what: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt
    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{what}: {name}: the hub does not give its config.json: {reason}",
            f"name a folder, or give {_shape_for(what)}",
        ) from None
