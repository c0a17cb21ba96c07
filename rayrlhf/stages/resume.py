"""`--resume`: the checkpoints that PPO and the supervised stages go on from, and whether this config may."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayrlhf.actors.placement import TRAINING
from rayrlhf.checkpoint.store import CheckpointStore
from rayrlhf.config import Config
from rayrlhf.config.run import StageName
from rayrlhf.errors import ConfigError
from rayrlhf.stages.lineage import ppo_section

__all__ = [
    "as_json",
    "check_same",
    "has_checkpoints",
    "inputs_of_arm",
    "let_go",
    "store_of_arm",
    "store_of_training",
]

# Inputs of a stage that do not change what is learned; all others must be as they were.
MAY_CHANGE_IN_PPO = (
    "sections.ppo.steps",
    "sections.ppo.max_failed_share",
    "sections.weights",
    *(f"sections.rollout.{key}" for key in ("engines", "kv_cache_gib", "gpu_memory_utilization", "max_sequences")),
    "sections.rollout.tensor_parallel",
    *(f"ranks.{role}" for role in ("reference", "reward", "rollout")),
)
MAY_CHANGE_IN_TRAINING = (
    *(f"sections.{stage}.log_every" for stage in TRAINING),
    "sections.sft.select.reward_model",  # the path; `judge` is what lies there
)
START_ANEW = "set it back; or leave --resume out to start anew (this run's folder then moves aside)"


def store_of_training(run: Path, config: Config, stage: str) -> CheckpointStore:
    """Of a supervised stage."""
    return CheckpointStore((run / "checkpoints" / "training" / stage).resolve(), config.checkpoint.keep)


def store_of_arm(run: Path, config: Config, arm: str | None) -> CheckpointStore:
    """`arm`: its name where there are several."""
    keep = config.checkpoint
    return CheckpointStore((run / "checkpoints" / (arm or "")).resolve(), keep.keep, keep.keep_best)


def inputs_of_arm(inputs: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The ppo stage's inputs, with the section as this arm has it; as JSON, where a tuple is a list."""
    sections = inputs.get("sections", {}) | {"ppo": ppo_section(config.ppo)}
    return as_json({**inputs, "sections": sections})


def as_json(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a manifest: a tuple is a list."""
    found: dict[str, Any] = json.loads(json.dumps(inputs, default=str))
    return found


def has_checkpoints(run: Path, stages: Collection[str]) -> bool:
    """Of any of these stages."""
    patterns = {"ppo": ("step-*", "*/step-*")} | {stage: (f"training/{stage}/step-*",) for stage in TRAINING}
    return any(any((run / "checkpoints").glob(p)) for stage in stages for p in patterns.get(stage, ()))


def let_go(run: Path, stage: str) -> None:
    """Of the checkpoints of a supervised stage that is done: nothing is to go on from them."""
    folder = run / "checkpoints" / "training" / stage
    shutil.rmtree(folder, ignore_errors=True)
    for parent in (folder.parent, folder.parent.parent):
        with suppress(OSError):  # it holds others
            parent.rmdir()


def check_same(run: Path, config: Config, stage: StageName, inputs: Mapping[str, Any]) -> None:
    """Raise ConfigError when checkpoints of `stage` were made with settings that matter and have changed since."""
    if stage in TRAINING:
        _refuse_changes(store_of_training(run, config, stage), as_json(inputs), MAY_CHANGE_IN_TRAINING)
    elif stage == "ppo":
        _check_arms(run, config, inputs)


def _check_arms(run: Path, config: Config, inputs: Mapping[str, Any]) -> None:
    arms = config.arms()
    of_one, of_several = (any((run / "checkpoints").glob(pattern)) for pattern in ("step-*", "*/step-*"))
    if of_one if len(arms) > 1 else of_several:
        raise ConfigError(
            f"{run}: its checkpoints are of {'one run' if of_one else 'several arms'}, ppo.arms names "
            f"{'several' if len(arms) > 1 else 'none or one'}",
            START_ANEW,
        )
    for name, arm in arms.items():
        store = store_of_arm(run, arm, name if len(arms) > 1 else None)
        _refuse_changes(store, inputs_of_arm(inputs, arm), MAY_CHANGE_IN_PPO)
        found = store.newest(whole=False)
        if found and found.step > arm.ppo.steps:
            raise ConfigError(f"{found.folder} is past ppo.steps, {arm.ppo.steps}", START_ANEW)


def _refuse_changes(store: CheckpointStore, inputs: Mapping[str, Any], may_change: Collection[str]) -> None:
    found = store.newest(whole=False)
    changed = list(_differences(found.inputs, inputs, may_change)) if found else []
    if found and changed:
        shown = "; ".join(f"{path} was {_short(was)}, is {_short(now)}" for path, was, now in changed[:5])
        raise ConfigError(f"this run cannot go on from {found.folder}: {shown}", START_ANEW)


def _differences(was: Any, now: Any, may_change: Collection[str], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if any(path == key or path.startswith(f"{key}.") for key in may_change):
        return
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in sorted(was.keys() | now.keys()):
            yield from _differences(was.get(key), now.get(key), may_change, f"{path}.{key}" if path else key)
    elif was != now:
        yield path.removeprefix("sections."), was, now


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
