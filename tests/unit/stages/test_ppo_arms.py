"""What the arms of a ppo stage leave: one folder for all of them."""

from __future__ import annotations

import json
from pathlib import Path

from rayrlhf.stages.ppo import join_arms


def leave(folder: Path, arm: str, *models: str) -> None:
    for model in models:
        (folder / model).mkdir(parents=True)
        (folder / model / "config.json").write_text(arm)
    (folder / "metrics.jsonl").write_text(json.dumps({"arm": arm, "step": 1}) + "\n")


def test_every_arms_policy_and_average_are_kept_and_their_records_joined_in_order(tmp_path: Path) -> None:
    leave(tmp_path / "arms" / "plain", "plain", "model", "model_ema", "value")
    leave(tmp_path, "mixed", "model", "model_ema", "value")
    join_arms(tmp_path, ["plain", "mixed"])
    assert {path.name: (path / "config.json").read_text() for path in tmp_path.glob("model*")} == {
        "model": "mixed",
        "model_ema": "mixed",
        "model_plain": "plain",
        "model_plain_ema": "plain",
    }
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["arm"] for record in records] == ["plain", "mixed"]
    assert not (tmp_path / "arms").exists()
