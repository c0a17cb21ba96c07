"""The demo's whole chain in small: responses collected and ranked, DPO, two PPO arms on one set of actors, eval."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import FinishedRun, finish, rayrlhf

SMALL = [
    "world.size=0.05",
    "model.from_scratch.hidden_size=64",
    "model.from_scratch.heads=2",
    "model.from_scratch.layers=2",
    "pretrain.max_steps=40",
    "ppo.steps=2",
    "ppo.batch_size=32",
    "ppo.minibatch_size=16",
    "eval.prompts=24",
    "eval.best_of=2",
    "eval.bootstrap=200",
]
ARMS = ("sft", "best_of_2", "dpo", "ppo", "ppo_ptx")
HUMAN_DATA = Path(os.environ.get("RAYRLHF_HUMAN_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finish("configs/demo.yaml", "small", tmp_path_factory.mktemp("demo"), *SMALL)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_sft_models_own_responses_are_ranked_by_labelers_and_the_held_out_ones_by_gold_too(
    demo: FinishedRun,
) -> None:
    rankings = lines(demo.artifact("collect") / "rankings.jsonl")
    held_out = lines(demo.artifact("collect") / "heldout_rankings.jsonl")
    assert all(2 <= len(r["responses"]) == len(r["ranks"]) <= 9 for r in rankings)
    assert {r["source"] for r in rankings} <= {f"labeler_{n}" for n in range(1, 6)}
    assert {r["prompt"] for r in held_out if r["source"] == "gold"} == {r["prompt"] for r in held_out}
    assert 0.5 < demo.summary["evaluation"]["reward_accuracy"]["labeler_agreement"] <= 1


def test_both_arms_start_from_the_same_models_and_draw_the_same_prompts(demo: FinishedRun) -> None:
    records = demo.metrics("ppo")
    assert [(r["arm"], r["step"]) for r in records] == [("ppo", 1), ("ppo", 2), ("ppo_ptx", 1), ("ppo_ptx", 2)]
    first, other = records[0], records[2]
    # Before any update the two policies are one model, and the engines' seeds are the same.
    for name in ("reward/mean", "reward/gold", "response/length_mean", "value/loss"):
        assert first[name] == pytest.approx(other[name], rel=1e-5), name
    assert first["kl/mean"] == pytest.approx(0, abs=1e-4) == other["kl/mean"]
    assert "ptx/loss" in other
    assert "ptx/loss" not in first


def test_every_arm_is_evaluated_on_the_same_prompts(demo: FinishedRun) -> None:
    evaluation, answers = demo.summary["evaluation"], lines(demo.folder / "answers.jsonl")
    assert len(answers) == evaluation["prompts"] == 24
    assert all(tuple(row["answers"]) == ARMS for row in answers)
    assert set(evaluation["gold_win_rate"]) == {f"{arm}_vs_sft" for arm in ARMS[1:]}
    assert evaluation["kl_per_response"]["sft"]["value"] == pytest.approx(0, abs=1e-3)
    assert set(evaluation["pretrain_loss"]) == set(evaluation["cloze_accuracy"]) == set(ARMS) - {"best_of_2"}
    for row in answers:
        for name, answer in row["answers"].items():
            assert ("kl" in answer) == (name != "best_of_2")
            assert len(answer.get("kl", answer["tokens"])) == len(answer["tokens"])


def test_the_run_leaves_every_policy_a_report_and_no_shared_memory(demo: FinishedRun) -> None:
    for name in ("model", "model_ppo", "model_dpo"):
        assert (demo.folder / name / "model.safetensors").is_file()
    assert "small" in (demo.folder / "report.html").read_text(encoding="utf-8")
    assert demo.shared_memory_left == set()


def test_eval_takes_the_run_again_with_another_model_and_other_questions(demo: FinishedRun, tmp_path: Path) -> None:
    questions = HUMAN_DATA / "eval_piqa.jsonl.gz"
    if not questions.is_file():
        pytest.skip(f"no human data at {HUMAN_DATA}")
    asked = [f"data.multiple_choice=[{questions}]", "data.max_records=60", "eval.prompts=8"]
    model = str(demo.folder / "model_ppo")
    done = rayrlhf("eval", str(demo.folder), model, *asked, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(result["gold_mean"]) == ["sft", "best_of_2", "dpo", "ppo", "ppo_ptx", "small/model_ppo"]
    assert result["gold_mean"]["small/model_ppo"] == result["gold_mean"]["ppo"]
    found = result["choices_by_source"]["sft"]["piqa_valid"]
    assert found["chance"] == 0.5
    assert 0 <= found["right"] <= 1
