"""Simulated labelers: nearly right, each in a way of their own."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from rayrlhf.worlds.base import World
from rayrlhf.worlds.labelers import PANEL, Labeler, judge_ranking, likert, ranks, see

WEIGHTS = {"right": 0.5, "civil": 0.3, "short": 0.2}


@pytest.mark.parametrize("labeler", PANEL, ids=lambda labeler: labeler.name)
def test_each_labeler_agrees_with_gold_on_80_to_93_percent_of_pairs_and_ties_at_least_10_percent(
    world: World, labeler: Labeler
) -> None:
    rng = random.Random(1)
    agreed = decided = tied = pairs = 0
    for _ in range(700):
        prompt = world.prompt(rng, False)
        answers = list(dict.fromkeys(world.demonstration(rng, prompt)[0] for _ in range(4)))
        flags = [world.flags(prompt, a, True) for a in answers]
        given = judge_ranking(rng, labeler, flags, world.weights)["ranks"]
        gold = [world.gold(prompt, answer) for answer in answers]
        for a, b in combinations(range(len(answers)), 2):
            pairs += 1
            tied += given[a] == given[b]
            if given[a] != given[b] and abs(gold[a] - gold[b]) > 1e-9:
                decided += 1
                agreed += (given[a] < given[b]) == (gold[a] > gold[b])
    assert 0.80 <= agreed / decided <= 0.93
    assert tied / pairs >= 0.10


def test_a_ranking_says_which_flags_were_seen_and_what_they_came_to_on_the_scale_from_1_to_7() -> None:
    flags = [{"right": True, "civil": True}, {"right": False, "civil": True}, {"right": True, "civil": False}]
    said = judge_ranking(random.Random(0), Labeler("exact", 0.0), flags, {"right": 0.75, "civil": 0.25})
    assert said == {"ranks": [1, 3, 2], "likert": [7, 3, 5], "flags": flags}  # 1 + 6; 1 + round(1.5); 1 + round(4.5)


def test_the_panel_has_several_labelers_who_differ_in_noise_and_in_tastes_for_flags_that_there_are(
    world: World,
) -> None:
    assert len({labeler.name for labeler in PANEL}) == len(PANEL) >= 3
    assert len({labeler.noise for labeler in PANEL}) > 1
    assert len({tuple(sorted(labeler.tastes.items())) for labeler in PANEL}) > 2
    for labeler in PANEL:
        assert set(labeler.tastes) <= set(world.weights), labeler.name


def test_a_labeler_without_noise_or_tastes_ranks_as_gold_does_up_to_ties(world: World) -> None:
    rng, exact = random.Random(3), Labeler("exact", 0.0)
    for _ in range(200):
        prompt = world.prompt(rng, False)
        answers = [world.demonstration(rng, prompt)[0] for _ in range(5)]
        flags = [world.flags(prompt, answer, True) for answer in answers]
        assert see(rng, exact, flags[0], world.weights) == flags[0]
        given, gold = judge_ranking(rng, exact, flags, world.weights)["ranks"], [world.gold(prompt, a) for a in answers]
        for a, b in combinations(range(5), 2):
            if given[a] != given[b]:
                assert (given[a] < given[b]) == (gold[a] > gold[b])
            else:
                assert abs(gold[a] - gold[b]) <= 1 / 6 + 1e-9  # one step of seven on the scale


@pytest.mark.parametrize(
    ("seen", "score"),
    [  # 1 + 6 x the share of the weights that is seen, rounded
        ({"right": True, "civil": True, "short": True}, 7),
        ({"right": True, "civil": True, "short": False}, 6),  # 5.8
        ({"right": True, "civil": False, "short": True}, 5),  # 5.2
        ({"right": True, "civil": False, "short": False}, 4),
        ({"right": False, "civil": True, "short": False}, 3),  # 2.8
        ({"right": False, "civil": False, "short": False}, 1),
    ],
)
def test_quality_is_said_on_a_scale_from_1_to_7(seen: dict[str, bool], score: int) -> None:
    assert likert(Labeler("plain", 0.1), seen, WEIGHTS) == score


def test_a_taste_multiplies_what_a_flag_is_worth_to_that_labeler() -> None:
    """Civil is worth 0.9 of 1.6 then: 1 + 6 x 0.7 / 1.6 = 3.6 without it, 1 + 6 x 0.9 / 1.6 = 4.4 with nothing else."""
    gentle = Labeler("gentle", 0.0, {"civil": 3.0, "no such flag": 9.0})
    assert likert(gentle, {"right": True, "civil": False, "short": True}, WEIGHTS) == 4
    assert likert(gentle, {"right": False, "civil": True, "short": False}, WEIGHTS) == 4


def test_the_heaviest_flag_is_misjudged_as_often_as_the_noise_says_and_the_others_a_fifth_as_often() -> None:
    rng, flags = random.Random(5), {"right": True, "civil": False, "short": True}
    wrong = dict.fromkeys(flags, 0)
    for _ in range(20_000):
        for flag, held in see(rng, Labeler("noisy", 0.25), flags, WEIGHTS).items():
            wrong[flag] += held != flags[flag]
    # Three standard errors: 3 sqrt(0.25 x 0.75 / 20,000) = 0.0092 and 3 sqrt(0.05 x 0.95 / 20,000) = 0.0046.
    assert wrong["right"] / 20_000 == pytest.approx(0.25, abs=0.0092)
    assert wrong["civil"] / 20_000 == pytest.approx(0.05, abs=0.0046)
    assert wrong["short"] / 20_000 == pytest.approx(0.05, abs=0.0046)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3, 7, 3, 1], [2, 1, 2, 3]),
        ([5, 5, 5], [1, 1, 1]),
        ([1.0, 2.0], [2, 1]),
        ([4], [1]),
        ([], []),
    ],
)
def test_ranks_are_dense_and_1_is_the_highest_score(scores: list[float], expected: list[int]) -> None:
    assert ranks(scores) == expected
