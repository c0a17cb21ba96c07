"""Checkpoints of a supervised stage: what its workers save every so often, and what they go on from. No Ray.

    checkpoints/training/sft/step-000020/
        manifest.json     step, how far the records and the best epoch are, the stage's inputs, and hashes
        state/            a learner's and the generators' state, a file for each rank
        before.json       what was found before the first step, such as dpo's reference log-probs
        metrics.jsonl     the stage's records so far
        best/             with sft.select: the best epoch's model so far

The order of the data needs no state: it follows from the seed and the step. All ranks write; rank 0 makes it whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayrlhf.checkpoint.store import Checkpoint, CheckpointStore
from rayrlhf.engines.deepspeed import Learner
from rayrlhf.engines.distributed import all_reduce_max
from rayrlhf.engines.state import load_state, save_state
from rayrlhf.errors import CheckpointError, Stopped
from rayrlhf.supervised.loop import Log, Progress

__all__ = ["CheckpointPlan", "Selection", "TrainingCheckpoints", "put_back"]

RECORDS, MODEL, BEST, BEFORE = "metrics.jsonl", "model", "best", "before.json"


@dataclass(frozen=True)
class CheckpointPlan:
    """What every worker of a stage is told."""

    store: CheckpointStore
    every: int
    """optimizer steps; 0 saves only when the stage is asked to end"""
    inputs: Mapping[str, Any]
    """all that goes into the stage, as JSON"""
    workspace: Path
    """where the records and the best epoch's model grow"""
    stop: Path
    """once this file is there, the stage is to save and to end"""
    found: Checkpoint | None = None
    """where to go on from; its records and best model are back in the workspace already"""


class Selection(Protocol):
    """What of the epochs judged so far is not in the workspace."""

    best: dict[str, float]


class TrainingCheckpoints:
    """`train`'s `Checkpoints`, on each rank."""

    def __init__(self, learner: Learner, plan: CheckpointPlan, log: Log, selection: Selection | None = None) -> None:
        self._learner, self._plan, self._log, self._selection = learner, plan, log, selection
        self._before: dict[str, Any] = {}
        state = plan.found.state if plan.found else {}
        self.figures = {"saves": state.get("saves", 0), "save_seconds": state.get("save_seconds", 0.0)}
        """checkpoints of the stage so far, and what they took"""

    def before(self, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `find` finds of the model before its first step, as JSON; found once, whatever happens after."""
        if self._plan.found is None:
            self._before = find()
        else:
            self._before = json.loads((self._plan.found.folder / BEFORE).read_text(encoding="utf-8"))
        return self._before

    def begin(self) -> Progress:
        found = self._plan.found
        if found is None:
            return Progress()
        self._log({"phase": "loading"})
        load_state(self._learner, found.folder / "state")
        random = load_file(self._random(found.folder))
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self._learner.device)
        state = found.state
        if self._selection is not None:
            self._selection.best = dict(state["best"])
        self._log({"phase": "training"})
        return Progress(found.step, state["tokens"], state["elapsed_s"], state["record"])

    def after_step(self, progress: Progress, steps: int) -> None:
        step, every = progress.step, self._plan.every
        asked = bool(all_reduce_max(float(self._learner.rank == 0 and self._plan.stop.exists()), self._learner.device))
        if asked or (every and step % every == 0):
            self._save(progress)
        if asked:
            raise Stopped(f"stopped after step {step} of {steps}, which is saved", "go on with --resume")

    def _save(self, progress: Progress) -> None:
        """
        Raises:
            CheckpointError: the disk is full, for one. What was saved before is still there.
        """
        started = perf_counter()
        self._log({"phase": "saving"})
        try:
            self._write(progress, started)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint of step {progress.step} cannot be written to {self._plan.store.root}: {error}",
                "mend that, then go on with --resume; earlier checkpoints are as they were",
            ) from None
        self.figures["saves"] += 1
        self.figures["save_seconds"] += perf_counter() - started
        self._log({"phase": "training"})

    def _write(self, progress: Progress, started: float) -> None:
        plan, rank = self._plan, self._learner.rank
        partial = plan.store.begin(progress.step) if rank == 0 else plan.store.partial(progress.step)
        _wait_for_all()
        save_state(self._learner, partial / "state")
        self._random(partial).parent.mkdir(exist_ok=True)
        save_file(_random_states(self._learner.device), self._random(partial))
        _wait_for_all()
        if rank:
            return
        self._check_all_wrote(partial)
        (partial / BEFORE).write_text(json.dumps(self._before), encoding="utf-8")
        shutil.copy2(plan.workspace / RECORDS, partial / RECORDS)
        best = self._selection.best if self._selection else {}
        if best:
            shutil.copytree(plan.workspace / MODEL, partial / BEST)
        state = {
            "tokens": progress.tokens,
            "elapsed_s": progress.elapsed_s,
            "record": dict(progress.record),
            "best": best,
            "saves": self.figures["saves"] + 1,
            "save_seconds": self.figures["save_seconds"] + perf_counter() - started,
        }
        plan.store.finish(progress.step, state, plan.inputs, None)

    def _check_all_wrote(self, partial: Path) -> None:
        for rank in range(self._learner.world_size):
            if not self._random(partial, rank).exists():
                raise CheckpointError(
                    f"rank {rank} has written its state, and rank 0's host does not see it in {partial}",
                    "set run.output to storage that all hosts share",
                )

    def _random(self, folder: Path, rank: int | None = None) -> Path:
        return folder / "state" / f"random-{self._learner.rank if rank is None else rank}.safetensors"


def put_back(found: Checkpoint | None, workspace: Path) -> None:
    """The workspace as it was when `found` was saved, or as it is before the first step."""
    shutil.rmtree(workspace / MODEL, ignore_errors=True)
    fresh = workspace / f".{RECORDS}"
    if found is None:
        fresh.write_bytes(b"")
    else:
        shutil.copyfile(found.folder / RECORDS, fresh)
        if (found.folder / BEST).is_dir():
            shutil.copytree(found.folder / BEST, workspace / MODEL)
    os.replace(fresh, workspace / RECORDS)  # not written in place: a worker that is on its way out may still hold it


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """uint8 each: what dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})
