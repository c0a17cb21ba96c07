"""What is read from a run's folder: columns, tables and sentences with the numbers that the files hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrlhf.errors import DataError
from rayrlhf.evaluation.report.answers import plain, prompt_table, sample_rows
from rayrlhf.evaluation.report.arms import arm_names, headline, label, reading
from rayrlhf.evaluation.report.densities import spread
from rayrlhf.evaluation.report.folder import read_folder
from rayrlhf.evaluation.report.series import ppo_columns, supervised_columns, thinned

EVALUATION = {
    "prompts": 512,
    "gold_win_rate": {
        "ppo_vs_sft": {"value": 0.66, "ci95": [0.62, 0.7]},
        "ppo_ptx_vs_sft": {"value": 0.712, "ci95": [0.673, 0.75]},
    },
    "length_controlled_win_rate": {"ppo_ptx_vs_sft": {"value": 0.69, "ci95": [0.65, 0.73]}},
    "gold_mean": {"sft": {"value": 0.5, "ci95": [0.48, 0.52]}, "ppo": {"value": 0.6, "ci95": None}},
    "kl_per_response": {"ppo_ptx": {"value": 5.24, "ci95": [5.0, 5.5]}},
    "pretrain_loss": {"sft": 1.19, "ppo_ptx": 1.23},
}


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "ppo", "step": 1, "kl/mean": 0.5}\n{"stage": "ppo", "st')
    run = read_folder(tmp_path)
    assert run.metrics == [{"stage": "ppo", "step": 1, "kl/mean": 0.5}]
    assert "The last line of metrics.jsonl was cut off and is left out." in run.notes


def test_broken_lines_in_the_middle_are_counted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n[2]\n{"step": 3}\n')
    run = read_folder(tmp_path)
    assert run.metrics == [{"step": 1}, {"step": 3}]
    assert "2 lines are no JSON object in metrics.jsonl (first: line 2) and left out." in run.notes


def test_the_config_is_read_flat_as_yaml_1_2(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: mine}\nppo: {learning_rate: 9e-6, kl: {target: 6}}\n")
    run = read_folder(tmp_path)
    assert run.config == {"run.name": "mine", "ppo.learning_rate": 9e-6, "ppo.kl.target": 6}
    assert run.name == "mine"


def test_a_folder_that_is_no_run_is_named_with_the_runs_near_it(tmp_path: Path) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "config.yaml").touch()
    with pytest.raises(DataError, match=r"runs: expected the folder of a run, found none of config\.yaml") as error:
        read_folder(tmp_path / "runs")
    assert error.value.hint == f"runs near it: {tmp_path / 'runs' / 'demo'}"
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "runs" / "dmeo")
    with pytest.raises(DataError, match="found a file"):
        read_folder(tmp_path / "runs" / "demo" / "config.yaml")


def test_a_run_of_one_arm_is_called_ppo_and_null_is_a_gap() -> None:
    records = [
        {"stage": "ppo", "step": 2, "kl/mean": None, "reward/mean": 1.5},
        {"stage": "ppo", "step": 1, "kl/mean": 0.25, "reward/mean": float("nan"), "weights/quarantine_reasons": {}},
    ]
    assert ppo_columns(records) == {"ppo": {"step": [1, 2], "kl/mean": [0.25, None], "reward/mean": [None, 1.5]}}


def test_arms_and_stages_are_kept_apart_and_a_step_done_twice_counts_once() -> None:
    records = [
        {"stage": "sft", "step": 1, "loss": 4.0},
        {"stage": "ppo", "arm": "ppo", "step": 1, "kl/mean": 0.1},
        {"stage": "ppo", "arm": "ppo_ptx", "step": 1, "kl/mean": 0.2},
        {"stage": "ppo", "arm": "ppo", "step": 1, "kl/mean": 0.3},
    ]
    assert {arm: table["kl/mean"] for arm, table in ppo_columns(records).items()} == {"ppo": [0.3], "ppo_ptx": [0.2]}
    assert supervised_columns(records) == {"sft": {"step": [1], "loss": [4.0]}}


def test_a_long_run_is_thinned_and_keeps_its_last_step() -> None:
    table = thinned({"step": list(range(1, 12)), "kl/mean": [i / 3 for i in range(11)]}, most=4)
    assert table["step"] == [1, 4, 7, 10, 11]
    assert table["kl/mean"] == [0.0, 1.0, 2.0, 3.0, 3.3333]


def test_arms_come_in_the_order_sft_trained_others() -> None:
    assert arm_names(EVALUATION, ["ppo_ptx", "ppo"], ["best_of_8"]) == ["sft", "ppo_ptx", "ppo", "best_of_8"]
    assert [label(a) for a in ("sft", "ppo_ptx", "best_of_8", "my_arm")] == ["SFT", "PPO-ptx", "Best of 8", "my arm"]


def test_the_headline_has_value_and_interval_of_each_arm() -> None:
    rows = {row["arm"]: row["cells"] for row in headline(EVALUATION, ["sft", "ppo", "ppo_ptx"], {})}
    assert rows["ppo_ptx"]["gold_win_rate"] == {"value": 0.712, "lo": 0.673, "hi": 0.75}
    assert rows["sft"] == {"gold_mean": {"value": 0.5, "lo": 0.48, "hi": 0.52}, "pretrain_loss": {"value": 1.19}}
    assert rows["ppo"]["gold_mean"] == {"value": 0.6}


def test_an_arm_without_evaluation_shows_the_last_tenth_of_its_training() -> None:
    trained = {"ppo": {"step": list(range(20)), "kl/mean": [0.0] * 18 + [2.0, 4.0]}}
    assert headline({}, ["ppo"], trained) == [
        {"arm": "ppo", "label": "PPO", "held_out": False, "cells": {"kl_per_response": {"value": 3.0}}}
    ]


def test_the_reading_is_one_sentence_of_the_best_arm_and_the_others() -> None:
    rows = headline(EVALUATION, ["sft", "ppo", "ppo_ptx"], {})
    assert reading(rows, {}, 512).replace("\u202f", " ") == (
        "By the gold judge, PPO-ptx wins against SFT on 71.2 % of 512 held-out prompts (95 % interval 67.3 to 75.0), "
        "69.0 % at equal length, 5.2 nats per response away from it; PPO on 66.0 %; the loss on pretraining text is "
        "1.19 (SFT), 1.23 (PPO-ptx)."
    )


def test_an_interval_that_holds_one_half_is_not_called_a_win() -> None:
    evaluation = {"gold_win_rate": {"ppo_vs_sft": {"value": 0.52, "ci95": [0.47, 0.57]}}}
    rows = headline(evaluation, ["ppo"], {})
    assert reading(rows, {}, None).replace("\u202f", " ") == (
        "By the gold judge, PPO cannot be told apart from SFT: it wins on 52.0 % of the held-out prompts "
        "(95 % interval 47.0 to 57.0)."
    )


def test_without_an_evaluation_the_reading_is_of_training() -> None:
    trained = {"ppo": {"step": [1, 2], "reward/mean": [-0.1, 0.83], "kl/mean": [0.0, 2.34]}}
    assert reading([], trained, None).replace("\N{MINUS SIGN}", "-") == (
        "Over 2 steps of PPO the mean reward rises from -0.10 to 0.83, 2.3 nats per response away from SFT."
    )
    assert reading([], {}, None) == ""


def test_few_values_are_shown_as_shares() -> None:
    assert spread({"sft": [0.2, 0.2, 1.0, 0.6], "ppo": [1.0, 1.0]}) == {
        "kind": "shares",
        "x": [0.2, 0.6, 1.0],
        "arms": {"sft": [0.5, 0.25, 0.25], "ppo": [0.0, 0.0, 1.0]},
        "means": {"sft": 0.5, "ppo": 1.0},
    }
    assert spread({"sft": [1.0]}) is None


def test_a_density_has_the_area_one_and_its_peak_at_the_scores() -> None:
    scores = [i / 50 for i in range(-50, 51)]
    curve = spread({"sft": scores, "ppo": [score + 3 for score in scores]})
    assert curve is not None
    assert curve["kind"] == "density"
    step = curve["x"][1] - curve["x"][0]
    for arm, centre in (("sft", 0.0), ("ppo", 3.0)):
        y = curve["arms"][arm]
        assert sum(y) * step == pytest.approx(1, abs=0.01)
        assert sum(x * d for x, d in zip(curve["x"], y, strict=True)) * step == pytest.approx(centre, abs=0.03)


def test_answers_keep_tokens_once_and_kl_in_thousandths() -> None:
    answer = {"text": "a cat", "tokens": ["a", " cat", "<|endoftext|>"], "kl": [0.5, -0.0314, None], "reward": 0.25}
    record = {"prompt_id": 7, "prompt": "<|user|>\nsay cat\n<|assistant|>", "kind": "say", "answers": {"ppo": answer}}
    table = prompt_table([record], ["sft", "ppo"])
    assert table == {
        "rows": [
            {
                "id": "7",
                "prompt": "say cat",
                "kind": "say",
                "answers": {
                    "ppo": {
                        "reward": 0.25,
                        "gold": None,
                        "flags": [],
                        "truncated": False,
                        "length": 3,
                        "sum": 0.4686,
                        "kl": [500, -31, None],
                        "tokens": [0, 1, 2],
                    }
                },
            }
        ],
        "vocabulary": ["a", " cat", "<|endoftext|>"],
        "notes": [],
    }


def test_answers_too_long_for_the_page_lose_their_kl_from_the_end_and_then_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = {"text": "so so", "tokens": ["so", " so"], "kl": [0.1, 0.2]}
    records = [{"prompt": "p", "answers": {"ppo": answer}}] * 5
    whole = prompt_table(records, ["ppo"])
    assert whole is not None
    a_row = len(json.dumps(whole["rows"][0], separators=(",", ":")))
    monkeypatch.setattr("rayrlhf.evaluation.report.answers.MOST_CHARACTERS", 5 * a_row - 20)
    table = prompt_table(records, ["ppo"])
    assert table is not None
    # A row is 15 characters shorter without its ,"kl":[100,200]; two of them make 20.
    assert ["kl" in row["answers"]["ppo"] for row in table["rows"]] == [True, True, True, False, False]
    assert table["notes"] == ["The KL of every token is shown for the first 3 prompts; answers.jsonl has the rest."]
    monkeypatch.setattr("rayrlhf.evaluation.report.answers.MOST_CHARACTERS", 2 * a_row)
    table = prompt_table(records, ["ppo"])
    assert table is not None
    assert len(table["rows"]) == 2
    assert table["notes"][0] == "The first 2 of 5 prompts are shown; answers.jsonl has all."


def test_samples_are_thinned_evenly_and_lose_the_chat_template() -> None:
    samples = [{"step": step, "prompt": "<|user|>\nhi\n", "response": f"{step}<|endoftext|>"} for step in range(10)]
    rows = sample_rows(samples, most=4)
    assert [(row["step"], row["prompt"], row["text"]) for row in rows] == [
        (0, "hi", "0"),
        (3, "hi", "3"),
        (6, "hi", "6"),
        (9, "hi", "9"),
    ]
    assert plain(None) == ""


def test_json_with_nan_is_read_as_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"stage": "ppo", "step": 1, "kl/mean": float("inf")}) + "\n")
    assert ppo_columns(read_folder(tmp_path).metrics) == {"ppo": {"step": [1]}}


def test_a_run_that_was_evaluated_later_shows_that_evaluation(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"name": "mine", "stages": {}}')
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "evaluation.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "eval" / "answers.jsonl").write_text('{"prompt": "hi"}\n')
    run = read_folder(tmp_path)
    assert run.summary["evaluation"] == EVALUATION
    assert run.answers == [{"prompt": "hi"}]
    assert "The evaluation is that of a later `rayrlhf eval`, in eval/." in run.notes


def test_a_runs_own_evaluation_goes_before_a_later_one(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"stages": {}, "evaluation": EVALUATION}))
    (tmp_path / "answers.jsonl").write_text('{"prompt": "own"}\n')
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "evaluation.json").write_text('{"prompts": 3}')
    run = read_folder(tmp_path)
    assert run.summary["evaluation"]["prompts"] == 512
    assert run.answers == [{"prompt": "own"}]
