"""`rayrlhf audit`: 0 and a table when the ledger holds, 1 and the line when it does not, 2 when there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rayrlhf import cli
from rayrlhf.checkpoint.ledger import LEDGER, Facts
from rayrlhf.driver.protocols import Quarantined, RolloutBatch, ScoredBatch
from rayrlhf.stages.ledger import Ledger
from rayrlhf.types import RolloutInfo


def leave(run: Path, arm: str | None = None, reason: str = "no [answer]") -> None:
    """Two steps of two samples; the second quarantines one more."""
    ledger = Ledger(run, Facts.of(0, [5], 1, 2), arm)
    ledger.start_from(None)
    for step, trained, out in ((1, (0, 1), ()), (2, (2, 4), (3,))):
        infos = tuple(RolloutInfo(sample, 5, 10, 4, False) for sample in trained)
        quarantined = tuple(Quarantined(sample, 5, reason) for sample in out)
        ledger.step(step, ScoredBatch(RolloutBatch(infos, ()), (), step, quarantined))
    ledger.end(2)


def audit(run: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["rayrlhf", "audit", str(run)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def cells(text: str) -> dict[str, str]:
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in text.splitlines() if line.count("│") == 3]
    return dict(rows)  # type: ignore[arg-type]


def test_a_ledger_that_holds_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path)
    assert audit(tmp_path, monkeypatch) == 0
    out = capsys.readouterr().out
    assert cells(out) == {
        "steps": "2",
        "samples": "5, from the first to sample 4",
        "trained": "4",
        "quarantined": "1",
        "no [answer]": "1",
        "rollbacks": "0",
        "steps done again": "0",
    }
    assert out.endswith("every sample is accounted for exactly once\n")


def test_a_table_is_shown_for_each_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, "plain")
    leave(tmp_path, "mixed")
    assert audit(tmp_path, monkeypatch) == 0
    out = capsys.readouterr().out
    assert out.index("ppo plain") < out.index("ppo mixed")


def test_a_contradiction_is_named_with_file_and_line_and_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    lines[2]["trained"][0] = lines[1]["trained"][0]
    (tmp_path / LEDGER).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert audit(tmp_path, monkeypatch) == 1
    shown = capsys.readouterr()
    assert "ledger.jsonl:3: sample 0 (epoch 0, prompt 5, index 0) is accounted for a second time" in shown.err
    assert "exactly once" not in shown.out


def test_a_folder_without_a_ledger_exits_2_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(tmp_path, monkeypatch) == 2
    assert "ledger.jsonl is not there" in (shown := capsys.readouterr().err)
    assert "such as runs/demo" in shown


def test_an_audit_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    leave(tmp_path)
    script = (
        "import sys; from pathlib import Path; from rich.console import Console; "
        "from rayrlhf.stages.audit import show_audit; show_audit(Path(sys.argv[1]), Console()); "
        "assert not {'torch', 'ray', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
