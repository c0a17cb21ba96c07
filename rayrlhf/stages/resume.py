"""`--resume`: the checkpoint that a PPO run goes on from, and whether this config may."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rayrlhf.checkpoint.store import CheckpointStore
from rayrlhf.config import Config
from rayrlhf.errors import ConfigError
from rayrlhf.stages.lineage import ppo_section

__all__ = ["check_same", "has_checkpoints", "inputs_of_arm", "store_of_arm"]

# Inputs of the ppo stage that do not change what is learned; all others must be as they were.
MAY_CHANGE = (
    "sections.ppo.steps",
    "sections.ppo.max_failed_share",
    "sections.weights",
    *(f"sections.rollout.{key}" for key in ("engines", "kv_cache_gib", "gpu_memory_utilization", "max_sequences")),
    "sections.rollout.tensor_parallel",
    *(f"ranks.{role}" for role in ("reference", "reward", "rollout")),
)
START_ANEW = "set it back; or leave --resume out to start anew (this run's folder then moves aside)"


def store_of_arm(run: Path, config: Config, arm: str | None) -> CheckpointStore:
    """`arm`: its name where there are several."""
    keep = config.checkpoint
    return CheckpointStore((run / "checkpoints" / (arm or "")).resolve(), keep.keep, keep.keep_best)


def inputs_of_arm(inputs: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The ppo stage's inputs, with the section as this arm has it; as JSON, where a tuple is a list."""
    sections = inputs.get("sections", {}) | {"ppo": ppo_section(config.ppo)}
    found: dict[str, Any] = json.loads(json.dumps({**inputs, "sections": sections}, default=str))
    return found


def has_checkpoints(run: Path) -> bool:
    return any((run / "checkpoints").glob("**/step-*"))


def check_same(run: Path, config: Config, inputs: Mapping[str, Any]) -> None:
    """Raise ConfigError when checkpoints of `run` were made with settings that matter and have changed since."""
    arms = config.arms()
    of_one, of_several = (any((run / "checkpoints").glob(pattern)) for pattern in ("step-*", "*/step-*"))
    if of_one if len(arms) > 1 else of_several:
        raise ConfigError(
            f"{run}: its checkpoints are of {'one run' if of_one else 'several arms'}, ppo.arms names "
            f"{'several' if len(arms) > 1 else 'none or one'}",
            START_ANEW,
        )
    for name, arm in arms.items():
        found = store_of_arm(run, arm, name if len(arms) > 1 else None).newest(whole=False)
        changed = list(_differences(found.inputs, inputs_of_arm(inputs, arm))) if found else []
        if found and changed:
            shown = "; ".join(f"{path} was {_short(was)}, is {_short(now)}" for path, was, now in changed[:5])
            raise ConfigError(
                f"this run cannot go on from {found.folder}: {shown}",
                START_ANEW,
            )
        if found and found.step > arm.ppo.steps:
            raise ConfigError(f"{found.folder} is past ppo.steps, {arm.ppo.steps}", START_ANEW)


def _differences(was: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if any(path == key or path.startswith(f"{key}.") for key in MAY_CHANGE):
        return
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in sorted(was.keys() | now.keys()):
            yield from _differences(was.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif was != now:
        yield path.removeprefix("sections."), was, now


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
