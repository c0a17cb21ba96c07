"""What `collect` makes of sampled responses, with a world small enough to rank by hand."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any, ClassVar

import pytest

from rayrlhf.config import Config
from rayrlhf.errors import DataError
from rayrlhf.stages import collect
from rayrlhf.stages.collect import _by_prompt, _Rankings, _requests
from rayrlhf.stages.sampling import Answer
from rayrlhf.types import PromptTokens
from rayrlhf.worlds.base import Sizes, World
from rayrlhf.worlds.labelers import Labeler


class Digits(World):
    """The gold score is in the response: "right civil" is 1, "right" 0.75, "civil" 0.25; unfinished is never civil."""

    sizes = Sizes(
        text=0,
        demonstrations=0,
        rankings=0,
        heldout_rankings=0,
        ranking_prompts=0,
        prompts=0,
        heldout_prompts=0,
    )
    weights: ClassVar = {"right": 0.75, "civil": 0.25}

    def document(self, rng: random.Random) -> str:
        raise NotImplementedError

    def prompt(self, rng: random.Random, heldout: bool) -> str:
        raise NotImplementedError

    def demonstration(self, rng: random.Random, prompt: str) -> tuple[str, str]:
        raise NotImplementedError

    def flags(self, prompt: str, response: str, finished: bool) -> dict[str, bool]:
        return {"right": "right" in response, "civil": "civil" in response and finished}


@pytest.fixture(autouse=True)
def one_exact_labeler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PANEL", (Labeler("exact", 0.0),))


def ranked(*responses: tuple[str, bool], gold: bool = False) -> tuple[list[dict[str, Any]], _Rankings]:
    """The records of one prompt's responses, each with whether it is finished."""
    answers = [Answer(4, text, finished) for text, finished in responses]
    rankings = _Rankings(Digits(), {4: "p"}, {4: answers}, seed=0)
    return list(rankings.of(4, gold)), rankings


def test_a_prompts_responses_are_ranked_by_one_labeler() -> None:
    records, _ = ranked(("civil", True), ("right civil", True), ("no", True), ("right", True))
    assert records == [
        {
            "prompt": "p",
            "responses": ["civil", "right civil", "no", "right"],
            "ranks": [3, 1, 4, 2],
            "likert": [3, 7, 1, 5],
            "flags": [
                {"right": r, "civil": c} for r, c in ((False, True), (True, True), (False, False), (True, False))
            ],
            "source": "exact",
        }
    ]


def test_held_out_responses_are_ranked_by_gold_too() -> None:
    records, _ = ranked(("right", True), ("right civil", True), ("right!", True), gold=True)
    assert [record["source"] for record in records] == ["exact", "gold"]
    assert records[1] == {
        "prompt": "p",
        "responses": ["right", "right civil", "right!"],
        "ranks": [2, 1, 2],
        "source": "gold",
    }


def test_responses_that_were_cut_are_named_by_number_and_judged_as_unfinished() -> None:
    records, _ = ranked(("right civil", False), ("right civil", True), ("civil", False), gold=True)
    assert [record["unfinished"] for record in records] == [[0, 2], [0, 2]]
    assert records[1]["ranks"] == [2, 1, 3]  # 0.75, 1, 0


def test_repeated_and_empty_responses_are_left_out() -> None:
    records, _ = ranked(("right", True), ("", True), ("right", True), ("civil", True), ("", False))
    assert records[0]["responses"] == ["right", "civil"]
    assert "unfinished" not in records[0]


def test_numbers_of_unfinished_responses_count_those_that_are_kept() -> None:
    records, _ = ranked(("right", True), ("right", True), ("", True), ("civil", False))
    assert (records[0]["responses"], records[0]["unfinished"]) == (["right", "civil"], [1])


@pytest.mark.parametrize("responses", [[], [("right", True)], [("right", True), ("right", True)], [("", True)] * 3])
def test_a_prompt_with_fewer_than_two_different_responses_gives_no_ranking(responses: list[tuple[str, bool]]) -> None:
    records, rankings = ranked(*responses)
    assert records == []
    with pytest.raises(DataError, match="no prompt has two different responses to rank"):
        rankings.summary()


def test_the_summary_counts_agreement_ties_and_how_good_the_model_is_on_all_of_its_responses() -> None:
    answers = {
        0: [Answer(0, text, True) for text in ("right civil", "right", "right", "civil")],
        1: [Answer(1, text, True) for text in ("right", "right!", "no")],
        2: [Answer(2, "right civil", True)],  # not ranked, but the model said it
    }
    rankings = _Rankings(Digits(), {0: "a", 1: "b", 2: "c"}, answers, seed=0)
    kept = [record for prompt in answers for record in rankings.of(prompt, False)]
    assert [record["ranks"] for record in kept] == [[1, 2, 3], [1, 1, 2]]
    assert rankings.summary() == {
        "labeler_agreement": 1.0,
        "labelers": {"exact": 1.0},
        "ties": pytest.approx(1 / 6),
        # 1, 3/4, 3/4, 1/4; 3/4, 3/4, 0; 1
        "gold_mean": pytest.approx(5.25 / 8),
        "fully_right": 2 / 8,
    }


def test_agreement_is_over_pairs_that_neither_the_labeler_nor_gold_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """One who values manners at 2.25 of 3: right but rude (1 + 6 x 0.25) loses to civil but wrong (1 + 6 x 0.75)."""
    monkeypatch.setattr(collect, "PANEL", (Labeler("gentle", 0.0, {"civil": 9.0}),))
    records, rankings = ranked(("right", True), ("civil", True), ("right civil", True))
    assert records[0]["ranks"] == [3, 2, 1]
    # Gold: right > civil, right civil > right, right civil > civil. The labeler differs in the first.
    assert rankings.summary()["labeler_agreement"] == pytest.approx(2 / 3)


def test_the_same_prompt_is_ranked_by_the_same_labeler_whatever_else_is_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PANEL", tuple(Labeler(f"l{i}", 0.3) for i in range(5)))
    answers = {i: [Answer(i, text, True) for text in ("right", "civil", "no")] for i in range(30)}
    texts = {i: f"prompt {i}" for i in range(30)}

    def all_of(order: list[int]) -> dict[int, dict[str, Any]]:
        rankings = _Rankings(Digits(), texts, answers, seed=0)
        return {i: next(rankings.of(i, False)) for i in order}

    forward, backward = all_of(list(range(30))), all_of(list(reversed(range(30))))
    assert forward == backward
    assert {record["source"] for record in forward.values()} == {f"l{i}" for i in range(5)}


def test_noise_makes_labelers_differ_from_gold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PANEL", (Labeler("noisy", 0.2),))
    answers = {i: [Answer(i, text, True) for text in ("right civil", "right", "civil", "no")] for i in range(400)}
    rankings = _Rankings(Digits(), {i: f"prompt {i}" for i in range(400)}, answers, seed=0)
    records = [record for i in range(400) for record in rankings.of(i, False)]
    gold, agreed = [1.0, 0.75, 0.25, 0.0], []
    for record in records:
        for a, b in combinations(range(4), 2):
            if record["ranks"][a] != record["ranks"][b]:
                agreed.append((record["ranks"][a] < record["ranks"][b]) == (gold[a] > gold[b]))
    assert rankings.summary()["labeler_agreement"] == pytest.approx(sum(agreed) / len(agreed))
    assert 0.6 < sum(agreed) / len(agreed) < 0.95


# ---- what is asked of the engines


def config(**given: Any) -> Config:
    tree = {"model": {"path": "org/name"}, "world": {"name": "instructions"}, "collect": given}
    return Config.model_validate(tree)


def test_each_prompt_gets_between_the_fewest_and_the_most_responses_each_with_a_seed_of_its_own() -> None:
    prompts: list[PromptTokens] = [PromptTokens(i, None) for i in range(200)]  # type: ignore[arg-type]
    requests = _requests(config(fewest=3, most=6), prompts)
    counts = [sum(request.prompt_id == i for request in requests) for i in range(200)]
    assert set(counts) == {3, 4, 5, 6}
    assert [request.sample_id for request in requests] == list(range(sum(counts)))
    assert len({request.seed for request in requests}) == len(requests)
    assert requests == _requests(config(fewest=3, most=6), prompts)


def test_answers_come_together_by_prompt_in_the_order_they_were_asked_for() -> None:
    found = {3: Answer(7, "c", True), 0: Answer(7, "a", True), 2: Answer(5, "b", False)}
    assert _by_prompt(found) == {7: [found[0], found[3]], 5: [found[2]]}
