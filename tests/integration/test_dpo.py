"""`rayrlhf dpo` on the tiny run's SFT model, with real Ray and DeepSpeed: one rank, then two under ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import DPO, FinishedRun, rayrlhf

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_first_loss_is_log_2_and_the_implicit_reward_learns_the_rankings(baseline: Path) -> None:
    steps = records(baseline)
    assert [(r["stage"], r["step"]) for r in steps] == [("dpo", step) for step in range(1, 7)]
    assert steps[0]["loss"] == pytest.approx(0.69314718, abs=1e-5)
    assert abs(steps[0]["margin"]) < 1e-5
    assert steps[-1]["loss"] < 0.69
    assert steps[-1]["margin"] > 0.02
    assert steps[-1]["accuracy"] > 0.5
    stage = json.loads((baseline / "summary.json").read_text())["stages"]["dpo"]
    assert list(stage["parents"]) == ["sft"]
    assert stage["examples"] + stage["data"]["all_ties"] == 400
    assert sorted(stage["accuracy"]) == [f"labeler_{n}" for n in range(1, 6)]
    for row in stage["accuracy"].values():
        assert row["accuracy"] > 0.5
        assert row["pairs"] == row["pairs_before_dropping"]


def test_the_policy_is_left_beside_the_recipes_own(baseline: Path, finished: FinishedRun) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert not (baseline / "model").exists(), "that is where ppo leaves its policy"
    policy = AutoModelForCausalLM.from_pretrained(baseline / "model_dpo")
    assert len(AutoTokenizer.from_pretrained(baseline / "model_dpo")) == policy.config.vocab_size
    sft = AutoModelForCausalLM.from_pretrained(finished.artifact("sft") / "model")
    assert any(bool((a != b).any()) for a, b in zip(policy.parameters(), sft.parameters(), strict=True))


@pytest.mark.slow
def test_two_ranks_under_zero_3_give_the_numbers_of_one(baseline: Path, finished: FinishedRun, tmp_path: Path) -> None:
    sft = finished.artifact("sft") / "model"
    shape = ["dpo.zero_stage=3", "cluster.train.ranks=2", "cluster.train.threads=1"]
    given = [f"model={{path: {sft}}}", f"sft.path={sft}", f"run.output={tmp_path}", "run.name=two"]
    done = rayrlhf("dpo", finished.arguments[0], *given, *DPO, *shape)
    assert done.returncode == 0, done.stdout + done.stderr
    got, want = records(tmp_path / "two"), records(baseline)
    assert len(got) == len(want) == 6
    for a, b in zip(got, want, strict=True):
        for name in ("loss", "margin", "chosen_log_ratio", "rejected_log_ratio", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), (a["step"], name)
        if a["step"] > 1:  # before it all implicit rewards are equal, and rounding says which is larger
            assert a["accuracy"] == pytest.approx(b["accuracy"], abs=1e-3), a["step"]
