"""What summary.json keeps of a run that did not finish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayrlhf.config import load_config
from rayrlhf.errors import TrainingError
from rayrlhf.stages import run

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
