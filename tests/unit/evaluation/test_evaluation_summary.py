"""The numbers of an evaluation, worked by hand from three prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayrlhf.evaluation.summary import choice, summarise
from rayrlhf.types import ChoiceQuestion


def answer(text: str, tokens: int, reward: float, **fields: Any) -> dict[str, Any]:
    return {"text": text, "tokens": ["t"] * tokens, "reward": reward, "truncated": False, **fields}


def judged(text: str, tokens: int, reward: float, right: bool, civil: bool, **fields: Any) -> dict[str, Any]:
    gold = 0.75 * right + 0.25 * civil
    return answer(text, tokens, reward, gold=gold, flags={"right": right, "civil": civil}, **fields)


def rows() -> list[dict[str, Any]]:
    sft = [
        judged("a b", 3, 0.0, False, True, kl=[0.0, 0.0, 0.0]),
        judged("a b", 3, 1.0, True, True, kl=[0.0, 0.0, 0.0]),
        judged("c d", 6, -1.0, False, False, kl=[0.0] * 6, truncated=True),
    ]
    ppo = [
        judged("a b c", 4, 2.0, True, True, kl=[0.5, 0.25, 0.0, 0.25]),
        judged("a b c", 4, 1.0, True, True, kl=[1.0, 0.0, 0.0, 1.0]),
        judged("d", 2, -2.0, False, True, kl=[-0.5, 0.5]),
    ]
    best = [
        judged("a b", 3, 0.5, False, True),
        judged("a b", 3, 1.5, True, True),
        judged("c", 2, 0.0, False, False),
    ]
    return [
        {"prompt_id": i, "prompt": f"p{i}", "kind": kind, "answers": {"sft": s, "best_of_4": b, "ppo": p}}
        for i, (kind, s, b, p) in enumerate(zip(("sort", "list", "sort"), sft, best, ppo, strict=True))
    ]


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    choices = [
        {"source": source, "right": right, "right_by_character": by_character, "chance": chance}
        for source, right, by_character, chance in (
            ("a", True, True, 0.25),
            ("a", False, True, 0.25),
            ("b", True, False, 0.5),
            ("b", True, False, 0.5),
        )
    ]
    measures = {"sft": {"pretrain_loss": 2.5, "choices": choices}, "ppo": {"pretrain_loss": 2.75}}
    return summarise(rows(), measures, "sft", resamples=200, seed=0)


def values(found: dict[str, Any]) -> dict[str, float]:
    return {arm: round(cell["value"], 6) for arm, cell in found.items()}


def test_means_are_by_arm_and_over_prompts(summary: dict[str, Any]) -> None:
    assert summary["prompts"] == 3
    assert values(summary["reward_mean"]) == {"sft": 0.0, "best_of_4": 0.666667, "ppo": 0.333333}
    assert values(summary["length_mean"]) == {"sft": 4.0, "best_of_4": 2.666667, "ppo": 3.333333}
    assert values(summary["gold_mean"]) == {"sft": 0.416667, "best_of_4": 0.416667, "ppo": 0.75}
    assert summary["truncated"] == {"sft": pytest.approx(1 / 3), "best_of_4": 0.0, "ppo": 0.0}


def test_kl_is_the_sum_over_a_response_and_of_best_of_n_its_bound(summary: dict[str, Any]) -> None:
    # (1 + 2 + 0) / 3; log 4 - 3/4
    assert values(summary["kl_per_response"]) == {"sft": 0.0, "best_of_4": 0.636294, "ppo": 1.0}
    assert summary["kl_per_response"]["best_of_4"]["bound"] is True
    assert "bound" not in summary["kl_per_response"]["ppo"]


def test_flags_are_shares_of_prompts_and_all_of_them_at_once_beside(summary: dict[str, Any]) -> None:
    assert summary["flags"]["sft"] == pytest.approx({"right": 1 / 3, "civil": 2 / 3, "all": 1 / 3})
    assert summary["flags"]["ppo"] == pytest.approx({"right": 2 / 3, "civil": 1.0, "all": 2 / 3})


def test_win_rates_are_over_the_base_and_ties_are_half(summary: dict[str, Any]) -> None:
    # gold: ppo wins, ties, wins; best of 4 ties throughout. Reward: ppo wins, ties, loses; best of 4 wins throughout.
    assert values(summary["gold_win_rate"]) == {"best_of_4_vs_sft": 0.5, "ppo_vs_sft": 0.833333}
    assert values(summary["reward_win_rate"]) == {"best_of_4_vs_sft": 1.0, "ppo_vs_sft": 0.5}
    assert set(summary["length_controlled_win_rate"]) == {"best_of_4_vs_sft", "ppo_vs_sft"}
    assert "heldout_reward_win_rate" not in summary


def test_every_mean_and_rate_has_an_interval_around_it(summary: dict[str, Any]) -> None:
    for name in ("reward_mean", "length_mean", "gold_mean", "gold_win_rate", "kl_per_response", "cloze_accuracy"):
        for cell in summary[name].values():
            low, high = cell["ci95"]
            assert low <= cell["value"] <= high


def test_variety_is_of_an_arms_answers_together(summary: dict[str, Any]) -> None:
    # ab ab cd; ab ab (c is too short); ab bc ab bc
    assert summary["distinct_2"] == {"sft": pytest.approx(2 / 3), "best_of_4": 0.5, "ppo": 0.5}


def test_what_was_measured_without_prompts_is_there_for_the_arms_that_have_it(summary: dict[str, Any]) -> None:
    assert summary["pretrain_loss"] == {"sft": 2.5, "ppo": 2.75}
    assert values(summary["cloze_accuracy"]) == {"sft": 0.75}


def test_gold_is_shown_by_kind_of_prompt_too(summary: dict[str, Any]) -> None:
    assert summary["gold_by_kind"] == {
        "list": {"sft": 1.0, "best_of_4": 1.0, "ppo": 1.0},
        "sort": {"sft": 0.125, "best_of_4": 0.125, "ppo": 0.625},
    }


def test_without_a_world_there_is_no_gold_and_a_held_out_reward_model_has_its_own_win_rate() -> None:
    found = summarise(
        [
            {
                "prompt_id": 0,
                "prompt": "p",
                "kind": "",
                "answers": {
                    "sft": answer("a", 1, 0.0, heldout_reward=1.0),
                    "dpo": answer("b", 1, 1.0, heldout_reward=0.5),
                },
            }
        ],
        {},
        "sft",
        resamples=100,
        seed=0,
    )
    assert not [name for name in found if "gold" in name or name == "flags"]
    assert values(found["reward_win_rate"]) == {"dpo_vs_sft": 1.0}
    assert values(found["heldout_reward_win_rate"]) == {"dpo_vs_sft": 0.0}
    assert "kl_per_response" not in found


def test_a_summary_is_plain_json_and_the_same_for_the_same_seed(summary: dict[str, Any]) -> None:
    assert json.loads(json.dumps(summary)) == summary
    assert summarise(rows(), {}, "sft", 200, 0)["gold_win_rate"] == summary["gold_win_rate"]


def test_multiple_choice_is_by_source_too_beside_what_guessing_gives(summary: dict[str, Any]) -> None:
    assert summary["choices_by_source"]["sft"] == {
        "a": {"questions": 2, "right": 0.5, "right_by_character": 1.0, "chance": 0.25},
        "b": {"questions": 2, "right": 1.0, "right_by_character": 0.0, "chance": 0.5},
    }


def test_a_choice_is_right_as_a_whole_or_per_character() -> None:
    question = ChoiceQuestion("the sky is", ("blue", "as green as grass"), 1, "made")
    # -4 / 4 characters against -10 / 17: the long one is the less likely whole, and the likelier per character
    found = choice(question, [-4.0, -10.0])
    assert found == {"source": "made", "right": False, "right_by_character": True, "chance": 0.5}


@pytest.mark.parametrize("judge", ["gold", "heldout_reward", "reward"])
def test_wins_at_equal_length_are_of_the_best_judge_there_is(judge: str) -> None:
    order = ("gold", "heldout_reward", "reward")
    kept = order[order.index(judge) :]
    score = {"gold": (0.0, 1.0), "heldout_reward": (1.0, 0.0), "reward": (0.5, 0.5)}
    table = [
        {
            "prompt_id": i,
            "prompt": "p",
            "kind": "",
            "answers": {
                arm: {"text": "a b", "tokens": ["a", "b"], "truncated": False, "flags": {}}
                | {name: score[name][n] for name in kept}
                for n, arm in enumerate(("sft", "ppo"))
            },
        }
        for i in range(20)
    ]
    [found] = summarise(table, {}, "sft", resamples=100, seed=0)["length_controlled_win_rate"].values()
    low, high = {"gold": (0.9, 1.0), "heldout_reward": (0.0, 0.1), "reward": (0.499, 0.501)}[judge]
    assert low <= found["value"] <= high
