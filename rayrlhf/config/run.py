"""`run`, `checkpoint` and `tracking`: what to run, what to keep, what to show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from rayrlhf.config.base import Folder, NonNegativeInt, Positive, PositiveInt, Section

__all__ = ["STAGES", "CheckpointConfig", "RunConfig", "StageName", "TrackingConfig"]

StageName = Literal["pretrain", "sft", "collect", "reward", "dpo", "ppo", "eval"]
# In the order in which they run; each comes after those it starts from.
STAGES: tuple[StageName, ...] = ("pretrain", "sft", "collect", "reward", "dpo", "ppo", "eval")
# Beside the folders of runs in `run.output`.
SHARED_FOLDERS = ("artifacts", "worlds")


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)] = "run"
    """Names the folder of the run and its actors. Not `artifacts` or `worlds`: those folders are shared by all runs."""
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0
    deterministic: bool = False
    """Two runs give the same numbers bit by bit: only deterministic kernels, an error where there is none. A CPU's are
    deterministic as it is."""
    output: Folder = Path("runs")
    """Runs go to `<output>/<name>/`; finished stages to `<output>/artifacts/`, shared by all runs there."""
    stages: tuple[StageName, ...] = ("pretrain", "sft", "collect", "reward", "ppo")
    """What `rayrlhf run` chains, in the recipe's order. `pretrain` is skipped when `model.path` is set, `collect` where
    there is no `collect` section; `dpo`, the baseline, and `eval` run only where they are named."""
    max_loss: Positive = 1e4
    """A loss beyond this, or one that is not finite, stops the run."""

    @field_validator("name")
    @classmethod
    def _no_shared_folder(cls, name: str) -> str:
        if name in SHARED_FOLDERS:
            raise ValueError(f"{name} is the folder that all runs share: take another name")
        return name


class CheckpointConfig(Section):
    every: NonNegativeInt = 0
    """PPO steps between checkpoints, from which `--resume` goes on; 0 saves only the models that the run ends with."""
    training_every: NonNegativeInt = 0
    """Optimizer steps between checkpoints of a supervised stage (pretrain, sft, reward, dpo), from which `--resume` and
    a worker that was lost go on; 0 saves none. They are let go once the stage is done."""
    keep: PositiveInt = 2
    """How many of the newest stay on disk, of PPO and of a supervised stage each."""
    keep_best: NonNegativeInt = 0
    """Beside them so many of those whose PPO step had the highest mean reward."""


class TrackingConfig(Section):
    wandb: Literal["off", "offline", "online"] = "off"
    """`online` without a login falls back to `offline`, and says so."""
    project: str = "rayrlhf"
    ray_metrics: bool = False
    """Offer each record's numbers to Prometheus too, at the metrics endpoint of the driver's Ray node."""
    samples_per_step: Annotated[int, Field(ge=0, le=64, strict=True)] = 4
    """Responses a step written, decoded, to samples.jsonl."""
