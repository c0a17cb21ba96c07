"""A training that stops after any step and goes on ends as one that did not stop: the loop, and what is saved."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from rayrlhf.checkpoint.store import Checkpoint, CheckpointStore
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample
from rayrlhf.engines.tasks import LanguageTask
from rayrlhf.errors import CheckpointError, Stopped
from rayrlhf.metrics.sinks import JsonLines, read_jsonl
from rayrlhf.models.build import PolicyModel
from rayrlhf.supervised import checkpoints
from rayrlhf.supervised.checkpoints import CheckpointPlan, TrainingCheckpoints, put_back
from rayrlhf.supervised.loop import Mix, TrainSettings, _batches, train
from tests.engine_fakes import VOCAB, PlainEngine, llama_config

STEPS = 7
SETTINGS = TrainSettings(
    learning_rate=0.2,
    batch_size=2,
    epochs=3.5,  # of two steps each
    warmup_ratio=0.3,
    final_lr_ratio=0.1,
    cutting=Cutting(30),
    log_every=3,
    seed=5,
)
TIMES = ("elapsed_s", "tokens_per_s")


def examples(count: int, seed: int) -> list[LMExample]:
    rng = np.random.default_rng(seed)
    return [LMExample(rng.integers(0, VOCAB, n).astype(np.int32), 1, "") for n in rng.integers(4, 12, count)]


class Epochs:
    """What `sft.select` keeps: here the newest epoch's number, and a file of it."""

    def __init__(self, workspace: Path) -> None:
        self.best: dict[str, float] = {}
        self._folder = workspace / "model"

    def __call__(self, step: int, steps: int) -> None:
        self._folder.mkdir(exist_ok=True)
        (self._folder / "weights").write_text(f"after {step}")
        self.best = {"step": step, "heldout_loss": 1.0 / step}


class Stage:
    """One stage's folder and store; each `run` is a process of its own, as after a crash."""

    def __init__(self, folder: Path, keep: int = 9) -> None:
        self.workspace, self.store = folder / "workspace", CheckpointStore(folder / "checkpoints", keep)
        self.workspace.mkdir()
        self.stop = folder / "stop"
        self.looked_at_the_start = 0

    def run(self, every: int = 1, found: Checkpoint | None = None, stop_after: int | None = None) -> list[Any]:
        """The weights at the end."""
        put_back(found, self.workspace)
        self.stop.unlink(missing_ok=True)
        torch.manual_seed(0 if found is None else 12345)  # another process has other weights and draws others
        module = PolicyModel(LlamaForCausalLM(llama_config(attention_dropout=0.4)))
        engine, epochs = PlainEngine(module, sgd=True), Epochs(self.workspace)
        plan = CheckpointPlan(self.store, every, {"is": "this"}, self.workspace, self.stop, found)
        lines = JsonLines(self.workspace / "metrics.jsonl")

        def log(record: dict[str, Any]) -> None:
            lines.write(record)
            if len(engine.rates) + (found.step if found else 0) == stop_after:
                self.stop.touch()

        keeper = TrainingCheckpoints(engine, plan, log, epochs)
        assert keeper.before(self.look) == {"heldout_loss_before": 0.1 + 0.2}
        if found is None:
            torch.manual_seed(7)
        mix = Mix("text_loss", LanguageTask(examples(3, 2)), 0.5, 2, 11)
        task = LanguageTask(examples(5, 1))
        self.result = train(engine, task, SETTINGS, log, mix, epochs, keeper)
        self.best, self.figures = epochs.best, keeper.figures
        lines.close()
        return [p.tolist() for p in module.parameters()]

    def look(self) -> dict[str, Any]:
        self.looked_at_the_start += 1
        return {"heldout_loss_before": 0.1 + 0.2}

    def records(self) -> list[dict[str, Any]]:
        rows = read_jsonl(self.workspace / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k not in TIMES} for row in rows if "step" in row]


@pytest.fixture(autouse=True)
def plain_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner's state as its module's: DeepSpeed's is in tests/integration."""

    def save(learner: Any, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        save_file({n: t.clone() for n, t in learner.module.state_dict().items()}, folder / "state-0.safetensors")
        return folder / "state-0.safetensors"

    def load(learner: Any, folder: Path) -> None:
        learner.module.load_state_dict(load_file(folder / "state-0.safetensors"))

    monkeypatch.setattr(checkpoints, "save_state", save)
    monkeypatch.setattr(checkpoints, "load_state", load)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture
def whole(tmp_path: Path) -> Stage:
    """One that nothing happened to, with a checkpoint after each of its seven steps."""
    (tmp_path / "whole").mkdir()
    stage = Stage(tmp_path / "whole")
    stage.weights = stage.run()
    return stage


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_training_that_goes_on_from_any_step_ends_as_the_one_that_did_not_stop(whole: Stage, step: int) -> None:
    found = whole.store._read(whole.store.root / f"step-{step:06d}", whole=True)
    result, records = whole.result, whole.records()
    assert whole.run(found=found) == whole.weights
    assert whole.records() == records
    assert [record["step"] for record in records] == [1, 3, 6, 7]
    assert {k: v for k, v in whole.result.items() if k not in TIMES} == {
        k: v for k, v in result.items() if k not in TIMES
    }
    assert whole.best == {"step": 7, "heldout_loss": 1.0 / 7}
    assert whole.looked_at_the_start == 1, "the start model is not there any more: what it said is kept"
    assert whole.figures["saves"] == 7


def test_dropout_draws_what_it_would_have_drawn_or_this_says_nothing(whole: Stage, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    found = whole.store._read(whole.store.root / "step-000003", whole=True)
    assert whole.run(found=found) != whole.weights


@pytest.mark.parametrize("step", [1, 3, 6, 7])  # those with a record: it is told while one is written
def test_a_training_that_is_asked_to_end_saves_whatever_the_interval_is(stage: Stage, whole: Stage, step: int) -> None:
    with pytest.raises(Stopped, match=f"stopped after step {step} of 7, which is saved"):
        stage.run(every=0, stop_after=step)
    found = stage.store.newest()
    assert found is not None
    assert stage.run(every=0, found=found) == whole.weights
    assert stage.records() == whole.records()


def test_without_an_interval_nothing_is_saved(stage: Stage, whole: Stage) -> None:
    assert stage.run(every=0) == whole.weights
    assert stage.store.newest() is None
    assert stage.figures == {"saves": 0, "save_seconds": 0.0}


def test_the_newest_stay_and_say_what_they_are_of(tmp_path: Path) -> None:
    stage = Stage(tmp_path, keep=2)
    stage.run(every=2)
    assert sorted(p.name for p in stage.store.root.iterdir()) == ["step-000004", "step-000006"]
    manifest = json.loads((stage.store.root / "step-000006" / "manifest.json").read_text())
    assert manifest["inputs"] == {"is": "this"}
    assert manifest["files"].keys() == {
        *("before.json", "metrics.jsonl", "best/weights"),
        *("state/state-0.safetensors", "state/random-0.safetensors"),
    }
    assert manifest["state"]["best"] == {"step": 6, "heldout_loss": 1.0 / 6}
    assert manifest["state"]["saves"] == 3
    assert (stage.store.root / "step-000006" / "best" / "weights").read_text() == "after 6"


def test_going_back_leaves_nothing_of_the_steps_after_it(whole: Stage) -> None:
    put_back(whole.store._read(whole.store.root / "step-000003", whole=True), whole.workspace)
    assert (whole.workspace / "model" / "weights").read_text() == "after 2"
    assert [record["step"] for record in whole.records()] == [1, 3]
    put_back(None, whole.workspace)
    assert not (whole.workspace / "model").exists()
    assert whole.records() == []


def test_a_full_disk_ends_the_stage_and_leaves_what_was_saved(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(path: Path, *arguments: Any, **more: Any) -> int:
        if "step-000003" in str(path):
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **more)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"step 3 cannot be written .* No space left on device"):
        stage.run()
    found = stage.store.newest()
    assert found is not None
    assert (found.step, stage.store.damaged) == (2, [])


def test_a_rank_whose_file_is_not_there_is_named(tmp_path: Path) -> None:
    engine = PlainEngine(torch.nn.Linear(1, 1), world_size=2)
    (tmp_path / "metrics.jsonl").write_text("")
    plan = CheckpointPlan(CheckpointStore(tmp_path / "c"), 1, {}, tmp_path, tmp_path / "stop")
    keeper = TrainingCheckpoints(engine, plan, lambda record: None)
    with pytest.raises(CheckpointError, match=r"rank 1 has written its state.*does not see it") as refused:
        keeper.after_step(checkpoints.Progress(1), 2)
    assert "run.output" in refused.value.hint


@pytest.mark.parametrize("done", [0, 1, 2, 3, 7, 20])
@pytest.mark.parametrize("count", [3, 10])  # less than a batch; two batches and two left out
def test_the_batches_after_a_step_are_those_that_would_have_come(count: int, done: int) -> None:
    plan = replace(SETTINGS, batch_size=4)
    assert list(islice(_batches(count, plan, done), 6)) == list(islice(_batches(count, plan), done + 6))[done:]
