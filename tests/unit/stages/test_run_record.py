"""What is kept of a run that did not finish, in summary.json and in its folder, and what it goes on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayrlhf.checkpoint.store import CheckpointStore
from rayrlhf.config import load_config
from rayrlhf.errors import Stopped, TrainingError
from rayrlhf.stages import run
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.resume import as_json

TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (TrainingError("the loss is not finite", "lower it"), "failed", "TrainingError: the loss is not finite"),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)
def test_a_run_that_failed_keeps_its_error_and_one_that_was_interrupted_has_none(
    error: BaseException, status: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(*_: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setitem(run.BODIES, "pretrain", body)
    config = load_config(TINY, [f"run.output={tmp_path}", "run.stages=[pretrain]"])
    with pytest.raises(type(error)):
        run.run(config, Console(quiet=True))
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["status"] == status
    assert summary.get("error", "").startswith(words)
    assert bool(summary.get("error")) == bool(words)


def run_stages(output: Path, *stages: str, resume: bool = False) -> Path:
    config = load_config(TINY, [f"run.output={output}", f"run.stages=[{','.join(stages)}]"])
    return run.run(config, Console(quiet=True), resume=resume)


def save_a_checkpoint(folder: Path, stage: str, inputs: Mapping[str, Any]) -> Path:
    store = CheckpointStore(folder / "checkpoints" / "training" / stage)
    store.begin(1)
    return store.finish(1, {}, as_json(inputs), None)


def test_a_run_that_was_asked_to_end_begins_no_other_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends_all_the_same(context: StageContext, *_: Any) -> dict[str, Any]:
        context.asked_to_end = True
        return {"memory_gib": {}}

    monkeypatch.setitem(run.BODIES, "pretrain", ends_all_the_same)
    with pytest.raises(Stopped, match="stopped before sft"):
        run_stages(tmp_path, "pretrain", "sft")
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert (summary["status"], list(summary["stages"])) == ("stopped", ["pretrain"])


def test_a_stage_that_stopped_goes_on_in_its_folder_and_needs_no_checkpoints_once_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed: list[bool] = []

    def body(context: StageContext, *_: Any) -> dict[str, Any]:
        resumed.append(context.resume)
        if len(resumed) == 1:
            (context.folder / "of the first").touch()
            save_a_checkpoint(context.folder, "pretrain", context.inputs)
            raise Stopped("stopped after step 1", "go on with --resume")
        assert (context.folder / "of the first").exists()
        return {"memory_gib": {}, "heldout_loss_before": 2.0, "heldout_loss": 1.0}

    monkeypatch.setitem(run.BODIES, "pretrain", body)
    with pytest.raises(Stopped):
        run_stages(tmp_path, "pretrain")
    assert run_stages(tmp_path, "pretrain", resume=True) == tmp_path / "tiny"
    assert resumed == [False, True]
    assert not (tmp_path / "tiny" / "checkpoints").exists()


def test_checkpoints_of_another_stage_are_nothing_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_a_checkpoint(tmp_path / "tiny", "sft", {})
    monkeypatch.setitem(
        run.BODIES, "pretrain", lambda *_: {"memory_gib": {}, "heldout_loss_before": 2.0, "heldout_loss": 1.0}
    )
    run_stages(tmp_path, "pretrain", resume=True)
    assert (tmp_path / "tiny.1" / "checkpoints" / "training" / "sft" / "step-000001").exists()
