"""The recipe on real human data: read only where it is, and at a size for CI."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, rayrlhf

FOLDER = Path(os.environ.get("RAYRLHF_HUMAN_DATA") or ROOT.parent / "shared" / "data")
FILES = ["pretrain.txt.gz", "demonstrations.jsonl.gz", "preferences_train.jsonl.gz", "prompts.jsonl.gz"]

pytestmark = [
    pytest.mark.integration,
    pytest.mark.human_data,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not all((FOLDER / name).exists() for name in FILES),
        reason="no human data: set RAYRLHF_HUMAN_DATA to a folder as configs/human.yaml describes",
    ),
]


def test_human_data_goes_through_every_stage_and_accuracy_is_told_per_source(tmp_path: Path) -> None:
    small = [
        "model.from_scratch={vocab_size: 1024, hidden_size: 64, layers: 2, heads: 2, context: 256}",
        "data.max_prompt_tokens=160",
        "data.max_records=40",
        "pretrain.max_steps=5",
        "sft.epochs=1",
        "sft.max_response_tokens=64",
        "reward.max_response_tokens=64",
        "ppo.steps=2",
        "ppo.batch_size=8",
        "ppo.minibatch_size=4",
        "rollout.max_tokens=16",
    ]
    done = rayrlhf(
        "run", "configs/human.yaml", f"run.output={tmp_path}", *small, timeout=500, RAYRLHF_HUMAN_DATA=str(FOLDER)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "human" / "summary.json").read_text())
    accuracy = summary["stages"]["reward"]["accuracy"]
    assert len(accuracy) >= 5, "several sources, never pooled"
    shares = {"pairs", "pairs_before_dropping", "accuracy", "longer_wins", "accuracy_by_k"}
    measures = {"ece", "length_bias", "length_bias_of_labels"}
    assert all(shares | measures == set(row) for row in accuracy.values())
    assert summary["stages"]["ppo"]["steps"] == 2
    assert summary["stages"]["sft"]["data"]["dropped"] > 0, "long prompts are dropped and counted"
