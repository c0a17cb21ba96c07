"""One tiny config and one finished run of it, shared by the tests that look at different sides of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "rayrlhf.cli"]
# Small enough for two cores and CI, every part real.
TINY = [
    "model.from_scratch.hidden_size=64",
    "model.from_scratch.heads=2",
    "model.from_scratch.layers=2",
    "pretrain.epochs=1",
    "pretrain.max_steps=20",
    "sft.epochs=1",
    "ppo.steps=50",
    "ppo.batch_size=16",
    "ppo.minibatch_size=8",
    "ppo.learning_rate=1e-4",
    "checkpoint.every=25",
    "rollout.max_tokens=12",
    # Nobody is logged in here: wandb must fall back to files of its own.
    "tracking.wandb=online",
    "tracking.ray_metrics=true",
]

# Of `rayrlhf dpo`: six steps, each of several micro-batches.
DPO = [
    "dpo.learning_rate=1e-3",
    "dpo.batch_size=16",
    "dpo.epochs=0.24",
    "dpo.log_every=1",
    "dpo.micro_batch_tokens=1024",
    "tracking.wandb=off",
]


# What a person's shell holds, and a run must leave nowhere.
SECRETS = {name: f"planted-{name.lower()}-4fQz81Lw" for name in ("HF_TOKEN", "REWARD_TOKEN", "AWS_SECRET_ACCESS_KEY")}


def rayrlhf(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_API_KEY": "", **SECRETS, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    output: Path
    arguments: list[str]
    stdout: str
    shared_memory_left: set[str]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def artifact(self, stage: str) -> Path:
        return self.output / "artifacts" / f"{stage}-{self.summary['stages'][stage]['key']}"

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [r for r in map(json.loads, lines) if r["stage"] == stage]


def shared_memory() -> set[str]:
    return {p.name for p in Path("/dev/shm").glob("*") if not p.name.startswith("sem.")}


def finish(config: str, name: str, output: Path, *overrides: str, timeout: float = 500) -> FinishedRun:
    """`rayrlhf run`, which must end well, and what it left in shared memory."""
    arguments, before = [config, f"run.name={name}", f"run.output={output}", *overrides], shared_memory()
    done = rayrlhf("run", *arguments, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return FinishedRun(output / name, output, arguments, done.stdout, shared_memory() - before)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The whole chain on the built-in world: one policy rank, one engine, 50 PPO steps."""
    return finish("configs/tiny.yaml", "tiny", tmp_path_factory.mktemp("runs"), *TINY)


@pytest.fixture(scope="session")
def baseline(finished: FinishedRun) -> Path:
    """The folder of a `dpo` that finds the SFT model of the finished chain."""
    done = rayrlhf("dpo", finished.arguments[0], "run.name=baseline", *finished.arguments[2:], *DPO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dpo's implicit reward on held-out pairs" in done.stdout
    return finished.output / "baseline"
