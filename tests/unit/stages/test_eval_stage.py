"""Which models `eval` compares, what a sampled response reads like, and the table of arms."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from rayrlhf.config import Config
from rayrlhf.data.tokenizer import train_tokenizer
from rayrlhf.errors import ConfigError
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.datasets import Prompts
from rayrlhf.stages.eval_command import _check_spelling, _named, _of_further
from rayrlhf.stages.evaluation import _Evaluation, arm_models
from rayrlhf.stages.run import _evaluation
from rayrlhf.stages.sampling import Answer, answers
from rayrlhf.stages.summary import show_summary
from rayrlhf.types import Prompt, PromptTokens, Rollout, RolloutInfo


def config(**ppo: Any) -> Config:
    return Config.model_validate({"model": {"path": "org/name"}, "world": {"name": "instructions"}, "ppo": ppo})


def test_the_arms_of_a_run_are_sft_first_then_dpo_then_ppos_with_the_last_arm_in_its_own_folder() -> None:
    arms = {"plain": {"ptx.coef": 0.0}, "half": {"ptx.coef": 0.5}, "whole": {}}
    parents = {"sft": "/a/sft/model", "reward": "/a/reward/model", "dpo": "/a/dpo/model", "ppo": "/a/ppo/model"}
    models = arm_models(config(ptx={"coef": 1.0}, arms=arms), parents)
    assert list(models.items()) == [
        ("sft", "/a/sft/model"),
        ("dpo", "/a/dpo/model"),
        ("plain", "/a/ppo/model_plain"),
        ("half", "/a/ppo/model_half"),
        ("whole", "/a/ppo/model"),
    ]


def test_a_run_without_arms_or_dpo_has_one_arm_beside_sft() -> None:
    parents = {"sft": "s", "reward": "r", "ppo": "/a/model"}
    assert arm_models(config(), parents) == {"sft": "s", "ppo": "/a/model"}
    assert arm_models(config(ptx={"coef": 1.0}), parents) == {"sft": "s", "ppo_ptx": "/a/model"}
    assert arm_models(config(), {"sft": "s", "reward": "r"}) == {"sft": "s"}


def test_a_response_is_read_without_its_prompt_and_special_tokens_and_knows_whether_it_ended() -> None:
    tokenizer = train_tokenizer(["name a red thing. a red apple."] * 20, 300)
    eos = tokenizer.eos_token_id

    def rollout(sample_id: int, response: list[int], truncated: bool) -> Rollout:
        prompt = tokenizer.encode("name a red thing.")
        size = len(response)
        info = RolloutInfo(sample_id, 40 + sample_id, len(prompt) + size, size, truncated)
        return Rollout(info, np.array([*prompt, *response]), np.zeros(size), np.zeros(size, dtype=int))

    words = tokenizer.encode(" a red apple.")
    found = answers(
        tokenizer, {0: rollout(0, [*words, eos], False), 1: rollout(1, words, True), 2: rollout(2, [eos], False)}
    )
    assert found == {
        0: Answer(40, "a red apple.", True),
        1: Answer(41, "a red apple.", False),
        2: Answer(42, "", True),
    }


def test_models_are_told_apart_in_the_table() -> None:
    assert _named(["/a/x/model", "/b/y/model"], ["sft"]) == {"x/model": "/a/x/model", "y/model": "/b/y/model"}
    same = ["/a/x/model", "/b/x/model"]
    assert _named(same, []) == {path: path for path in same}
    assert _named(["/ppo"], ["sft", "//ppo"]) == {"/ppo": "/ppo"}


def test_further_runs_add_their_policies_and_a_shared_sft_model_only_once(tmp_path: Path) -> None:
    def run(name: str, sft: str) -> Path:
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        config = {"run": {"stages": ["eval"]}, "model": {"path": "org/name"}, "data": {"heldout_prompts": ["h.jsonl"]}}
        (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
        (folder / "summary.json").write_text(json.dumps({"stages": {"sft": {"model": sft}}}), encoding="utf-8")
        return folder

    second, third, namesake = run("second", "/sft"), run("third", "/other"), run("a/third", "/sft")
    assert _of_further([second], {"sft": "/sft"}) == {"second/ppo": f"{second}/model"}
    assert _of_further([third, namesake], {"sft": "/sft"}) == {
        f"{third}/sft": "/other",
        f"{third}/ppo": f"{third}/model",
        f"{namesake}/ppo": f"{namesake}/model",
    }
    # A run of dpo alone has no SFT model of its own.
    (second / "model").rename(second / "model_dpo")
    (second / "summary.json").write_text('{"stages": {"dpo": {}}}', encoding="utf-8")
    assert _of_further([second], {"sft": "/sft"}) == {"second/dpo": f"{second}/model_dpo"}


def test_a_held_out_reward_model_judges_models_that_come_without_one_of_their_own() -> None:
    prompts = Prompts([PromptTokens(0, np.array([1]))], {}, {0: Prompt((("user", "p"),))})

    def roles(reward: str | None, **evaluation: Any) -> tuple[tuple[str, ...], dict[str, str]]:
        tree = {"model": {"path": "org/name"}, "data": {"heldout_prompts": ["h.jsonl"]}, "run": {"stages": ["eval"]}}
        settings = Config.model_validate(tree | {"eval": evaluation})
        context = SimpleNamespace(
            config=settings, folder=Path("run"), console=None, data=SimpleNamespace(heldout_prompts=prompts)
        )
        made = _Evaluation(cast(StageContext, context), {"a": "/a", "b": "/b"}, reward, Path())
        return made.scorers, dict(made.roles._models)

    assert roles(None) == (("policy", "reference"), {"policy": "/a", "reference": "/a"})
    judged = {"policy": "/a", "reference": "/a", "reward": "org/judge"}
    assert roles(None, reward_model="org/judge") == (("policy", "reference"), judged)
    own = ("policy", "reference", "reward"), judged | {"reward": "/r"}
    assert roles("/r", reward_model="org/judge") == roles("/r") == own


def cell(value: float, half: float) -> dict[str, Any]:
    return {"value": value, "ci95": [value - half, value + half]}


def test_the_table_of_arms_has_wins_over_sft_beside_what_each_arm_is() -> None:
    evaluation = {
        "prompts": 500,
        "temperature": 1.0,
        "base": "sft",
        "reward_mean": {"sft": cell(0.0, 0.1), "best_of_8": cell(1.0, 0.1), "ppo": cell(2.0, 0.125)},
        "gold_win_rate": {"best_of_8_vs_sft": cell(0.6, 0.03), "ppo_vs_sft": cell(0.75, 0.025)},
        "kl_per_response": {"sft": cell(0, 0), "best_of_8": cell(1.204, 0) | {"bound": True}, "ppo": cell(3.5, 0.25)},
        "pretrain_loss": {"sft": 2.5, "ppo": 2.625},
        "flags": {"sft": {"right": 0.5, "all": 0.25}, "ppo": {"right": 0.75, "all": 0.625}},
    }
    written = StringIO()
    summary = {"name": "mine", "stages": {}, "evaluation": evaluation}
    show_summary(Console(file=written, width=160), summary, Path("runs/mine"))
    lines = [
        [c.strip() for c in line.strip("│┃").split("│" if "│" in line else "┃")]
        for line in written.getvalue().split("\n")
    ]
    assert ["500 held-out prompts, temperature 1; wins are over sft"] in lines
    assert ["", "sft", "best of 8", "ppo"] in lines
    assert ["gold win rate", "-", "0.600 ±0.030", "0.750 ±0.025"] in lines
    assert ["reward", "0.000 ±0.100", "1.000 ±0.100", "2.000 ±0.125"] in lines
    assert ["KL, nats a response", "0.000 ±0.000", "< 1.204", "3.500 ±0.250"] in lines
    assert ["loss on text", "2.500", "-", "2.625"] in lines
    assert ["flag: right", "0.500", "-", "0.750"] in lines
    assert ["flawless (all flags)", "0.250", "-", "0.625"] in lines


def test_the_summary_of_a_run_has_evals_numbers_and_the_reward_models_accuracy() -> None:
    stages = {
        "collect": {"labeler_agreement": 0.9, "seconds": 1.0},
        "reward": {"accuracy": {"gold": {"accuracy": 0.8, "pairs": 7}, "labeler_1": {"accuracy": 0.75}}},
        "eval": {"prompts": 5, "gold_win_rate": {"ppo_vs_sft": 0.7}, "seconds": 2.0, "cached": False, "key": "k"},
    }
    assert _evaluation(stages) == {
        "prompts": 5,
        "gold_win_rate": {"ppo_vs_sft": 0.7},
        "reward_accuracy": {"gold": 0.8, "labeler_1": 0.75, "heldout": 0.8, "labeler_agreement": 0.9},
    }
    assert _evaluation({}) == {"reward_accuracy": {}}


def test_a_mistyped_run_is_named_before_any_hub_is_asked(tmp_path, monkeypatch):
    (tmp_path / "runs" / "baseline").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="runs/basline: no such folder") as error:
        _check_spelling(Path("runs/basline"))
    assert error.value.hint == "did you mean runs/baseline?"
    _check_spelling(Path("runs/baseline"))
    _check_spelling(Path("gpt2"))
    _check_spelling(Path("org/name"))  # a model of a hub: there is no such folder here
