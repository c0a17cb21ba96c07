"""How often the reward model and the longer-wins rule agree with the people who ranked, how sure, and how long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.prompts import RankingExample
from rayrlhf.evaluation.calibration import accuracy_by_k, expected_calibration_error, length_bias, pair_accuracy


def ranked(ranks: tuple[int, ...], chars: tuple[int, ...], source: str = "people") -> RankingExample:
    tokens = tuple(np.zeros(3, dtype=np.int32) for _ in ranks)
    return RankingExample(tokens, ranks, prompt_tokens=1, source=source, response_chars=chars)


def agreement(examples: Sequence[RankingExample], scores: Sequence[Sequence[float]]) -> dict[str, dict[str, Any]]:
    """The three numbers that are plain shares of pairs."""
    table = pair_accuracy(examples, scores)
    return {source: {n: row[n] for n in ("pairs", "accuracy", "longer_wins")} for source, row in table.items()}


def log_odds(*probabilities: float) -> np.ndarray:
    return np.array([math.log(p / (1 - p)) for p in probabilities])


def flat(row: dict[str, Any]) -> dict[str, float]:
    by_k = {f"{name} {k}": value for k, cell in row["accuracy_by_k"].items() for name, value in cell.items()}
    return {name: value for name, value in row.items() if name != "accuracy_by_k"} | by_k


def test_a_pair_is_won_when_the_better_rank_scores_higher() -> None:
    table = agreement([ranked((1, 2), (5, 9)), ranked((2, 1), (5, 9))], [(0.5, -1.0), (0.5, -1.0)])
    assert table == {"people": {"pairs": 2, "accuracy": 0.5, "longer_wins": 0.5}}


def test_every_pair_of_a_ranking_counts_and_rank_one_is_the_best() -> None:
    # Pairs (better, worse): (0, 1) won, (0, 2) lost, (1, 2) lost; by length: lost, lost, won.
    table = agreement([ranked((1, 2, 3), (10, 30, 20))], [(2.0, 1.0, 3.0)])
    assert table == {"people": {"pairs": 3, "accuracy": pytest.approx(1 / 3), "longer_wins": pytest.approx(1 / 3)}}


def test_equal_ranks_are_no_pair() -> None:
    table = agreement([ranked((1, 1, 2), (3, 4, 2))], [(5.0, 0.0, 1.0)])
    assert table == {"people": {"pairs": 2, "accuracy": 0.5, "longer_wins": 1.0}}


def test_a_source_with_nothing_but_ties_is_left_out() -> None:
    table = agreement([ranked((1, 1), (3, 4), "ties"), ranked((1, 2), (3, 4), "pairs")], [(1.0, 0.0), (1.0, 0.0)])
    assert table == {"pairs": {"pairs": 1, "accuracy": 1.0, "longer_wins": 0.0}}


def test_equal_scores_and_equal_lengths_count_half() -> None:
    table = agreement([ranked((1, 2), (7, 7))], [(0.25, 0.25)])
    assert table == {"people": {"pairs": 1, "accuracy": 0.5, "longer_wins": 0.5}}


def test_sources_are_never_pooled() -> None:
    examples = [
        ranked((1, 2), (9, 1), "long is good"),
        ranked((1, 2), (1, 9), "long is bad"),
        ranked((1, 2), (1, 9), "long is bad"),
        ranked((1, 2), (4, 4), ""),
    ]
    table = agreement(examples, [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 0.0)])
    assert table == {
        "": {"pairs": 1, "accuracy": 1.0, "longer_wins": 0.5},
        "long is bad": {"pairs": 2, "accuracy": 0.5, "longer_wins": 0.0},
        "long is good": {"pairs": 1, "accuracy": 1.0, "longer_wins": 1.0},
    }
    assert list(table) == ["", "long is bad", "long is good"]


def test_length_is_that_of_the_text_as_written_not_of_its_tokens() -> None:
    example = RankingExample((np.zeros(9, np.int32), np.zeros(2, np.int32)), (1, 2), 1, "people", (10, 500))
    assert agreement([example], [(1.0, 0.0)])["people"]["longer_wins"] == 0.0


def test_no_examples_give_no_table() -> None:
    assert agreement([], []) == {}


def test_as_many_scores_as_examples_are_needed() -> None:
    with pytest.raises(ValueError):
        agreement([ranked((1, 2), (1, 1))], [])


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(-8, 8), st.integers(0, 9)),
        min_size=2,
        max_size=6,
    ).filter(lambda rows: len({rank for rank, _, _ in rows}) > 1)
)
def test_turning_all_scores_around_turns_the_accuracy_around(rows: list[tuple[int, int, int]]) -> None:
    ranks, scores, chars = zip(*rows, strict=True)
    straight = agreement([ranked(ranks, chars)], [[float(s) for s in scores]])["people"]
    turned = agreement([ranked(ranks, chars)], [[-float(s) for s in scores]])["people"]
    assert straight["accuracy"] + turned["accuracy"] == pytest.approx(1.0)
    assert straight["longer_wins"] == turned["longer_wins"]


@given(st.permutations([(1, 3.0, 5), (2, 3.0, 5), (2, 1.0, 8), (3, 2.0, 1)]))
def test_the_order_of_the_responses_does_not_matter(rows: list[tuple[int, float, int]]) -> None:
    ranks, scores, chars = zip(*rows, strict=True)
    # Five pairs by score: one tie, one lost, three won. By length: one tie, one lost, three won.
    assert agreement([ranked(ranks, chars)], [scores]) == {
        "people": {"pairs": 5, "accuracy": pytest.approx(0.7), "longer_wins": pytest.approx(0.7)}
    }


# ---- calibration


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy_weighted_by_the_pairs_of_a_bin() -> None:
    # Five pairs at 0.78 for the first, three of them right: |0.6 - 0.78| = 0.18. Five at 0.62 for the second, four of
    # them right: |0.8 - 0.62| = 0.18. Two at 0.97 for the first, both right: 0.03.
    differences = log_odds(*[0.78] * 5, *[0.38] * 5, *[0.97] * 2)
    labels = np.array([*[1, 1, 1, -1, -1], *[-1, -1, -1, -1, 1], *[1, 1]])
    assert expected_calibration_error(differences, labels) == pytest.approx((10 * 0.18 + 2 * 0.03) / 12)


def test_gaps_cancel_within_a_bin_and_not_between_bins() -> None:
    # 0.71 and 0.74 share the bin from 0.70 to 0.75: |1/2 - 0.725|. 0.68 and 0.72 do not: (0.32 + 0.72) / 2.
    labels = np.array([1, -1])
    assert expected_calibration_error(log_odds(0.71, 0.74), labels) == pytest.approx(0.225)
    assert expected_calibration_error(log_odds(0.68, 0.72), labels) == pytest.approx(0.52)
    # Nor do the two lowest bins, to 0.55 and to 0.60: (0.47 + 0.57) / 2.
    assert expected_calibration_error(log_odds(0.53, 0.57), labels) == pytest.approx(0.52)


@pytest.mark.parametrize(
    ("difference", "label", "error"),
    [
        (0.0, 1, 0.0),
        (0.0, -1, 0.0),
        (math.log(3), 1, 0.25),
        (math.log(3), -1, 0.75),
        (-999.0, -1, 0.0),
        (999.0, -1, 1.0),
    ],
)
def test_one_pair_has_the_error_of_its_own_confidence(difference: float, label: int, error: float) -> None:
    assert expected_calibration_error(np.array([difference]), np.array([label])) == pytest.approx(error)


@given(st.lists(st.tuples(st.integers(-40, 40), st.sampled_from([-1, 1])), min_size=1, max_size=40))
def test_the_calibration_error_is_that_of_a_loop_over_bins(rows: list[tuple[int, int]]) -> None:
    error = 0.0
    for m in range(10):
        gap, low, high = 0.0, 0.5 + 0.05 * m, 0.55 + 0.05 * m
        for eighths, label in rows:
            first = 1.0 / (1.0 + math.exp(-eighths / 8))
            confidence, right = max(first, 1 - first), 0.5 if eighths == 0 else float((first > 0.5) == (label == 1))
            if low < confidence <= high or (m == 0 and confidence == 0.5):
                gap += right - confidence
        error += abs(gap) / len(rows)
    differences, labels = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    assert expected_calibration_error(differences / 8, labels) == pytest.approx(error)


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated_and_its_double_is_overconfident() -> None:
    right, wrong = [1] * 3, [-1]  # log 3 is 3 of 4; twice that is 9 of 10
    differences, labels = np.full(4, math.log(3)), np.array(right + wrong)
    assert expected_calibration_error(differences, labels) == pytest.approx(0.0)
    assert expected_calibration_error(2 * differences, labels) == pytest.approx(0.15)


# ---- length


def test_the_length_bias_within_a_prompt_is_kendalls_tau_of_its_scores_and_lengths() -> None:
    # The first beats and outgrows the other three; of the rest, 30 over 20 agrees, 10 over 30 and 10 over 20 do not.
    row = pair_accuracy([ranked((1, 2, 3, 4), (40, 10, 30, 20))], [(4.0, 3.0, 2.0, 1.0)])["people"]
    assert row["length_bias"] == pytest.approx(1 / 3)
    assert row["length_bias_of_labels"] == pytest.approx(1 / 3)


def test_equal_scores_and_equal_lengths_count_in_the_length_bias_as_in_tau_b() -> None:
    # Scores 3 3 1 with lengths 5 9 9: one pair against, two with a preference, two of unequal length: -1 / sqrt(2 * 2).
    # People rank all three apart: two pairs against, three with a preference, two of unequal length: -2 / sqrt(3 * 2).
    row = pair_accuracy([ranked((1, 2, 3), (5, 9, 9))], [(3.0, 3.0, 1.0)])["people"]
    assert row["length_bias"] == pytest.approx(-0.5)
    assert row["length_bias_of_labels"] == pytest.approx(-0.816496580927726)


def test_a_model_that_follows_length_stands_out_against_people_who_do_not() -> None:
    examples = [ranked((1, 2), (9, 1)), ranked((1, 2), (1, 9)), ranked((1, 2), (3, 7)), ranked((2, 1), (2, 8))]
    row = pair_accuracy(examples, [[float(n) for n in e.response_chars] for e in examples])["people"]
    # People: longer, shorter, shorter, longer.
    assert (row["length_bias"], row["length_bias_of_labels"]) == (1.0, 0.0)


# ---- how many responses were ranked


def test_accuracy_is_told_apart_for_each_number_of_responses_ranked_at_once() -> None:
    examples = [
        ranked((1, 2, 3), (1, 1, 1)),
        ranked((1, 2), (1, 1)),
        ranked((1, 1, 1, 2), (1, 1, 1, 1)),
        ranked((2, 1), (1, 1)),
        ranked((1, 2), (1, 1), "others"),
    ]
    scores = [(2.0, 3.0, 1.0), (1.0, 0.0), (0.0, 0.5, 1.0, 0.5), (0.5, 0.5), (0.0, 1.0)]
    table = pair_accuracy(examples, scores)
    assert table["people"]["accuracy_by_k"] == {
        2: {"pairs": 2, "accuracy": 0.75},
        3: {"pairs": 3, "accuracy": pytest.approx(2 / 3)},
        4: {"pairs": 3, "accuracy": 0.5},
    }
    assert list(table["people"]["accuracy_by_k"]) == [2, 3, 4]
    assert table["others"]["accuracy_by_k"] == {2: {"pairs": 1, "accuracy": 0.0}}


# ---- too little to say anything


@pytest.mark.parametrize("lengths", [(3, 8), (5, 5)])
def test_one_pair_has_no_length_bias(lengths: tuple[int, int]) -> None:
    row = pair_accuracy([ranked((1, 2), lengths)], [(1.0, 0.0)])["people"]
    assert math.isnan(row["length_bias"])
    assert math.isnan(row["length_bias_of_labels"])
    assert row["ece"] == pytest.approx(1 - 1 / (1 + math.exp(-1)))


def test_responses_of_one_length_have_no_length_bias() -> None:
    row = pair_accuracy([ranked((1, 2, 3), (5, 5, 5))], [(1.0, 0.0, 2.0)])["people"]
    assert math.isnan(row["length_bias"])
    assert math.isnan(row["length_bias_of_labels"])


def test_a_model_that_scores_all_the_same_has_no_length_bias_but_people_may() -> None:
    row = pair_accuracy([ranked((1, 2, 3), (7, 5, 3))], [(1.0, 1.0, 1.0)])["people"]
    assert math.isnan(row["length_bias"])
    assert (row["length_bias_of_labels"], row["ece"], row["accuracy"]) == (1.0, 0.0, 0.5)


def test_no_pairs_and_scores_that_are_not_numbers_give_nan_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    nothing = np.array([])
    assert math.isnan(expected_calibration_error(nothing, nothing))
    assert math.isnan(length_bias(nothing, nothing))
    assert accuracy_by_k(nothing, nothing) == {}
    row = pair_accuracy([ranked((1, 2, 3), (7, 5, 3))], [(1.0, math.nan, 0.0)])["people"]
    assert all(math.isnan(row[name]) for name in ("ece", "accuracy", "length_bias"))
    assert not recwarn.list


# ---- what holds for any ranking

RANKINGS = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.integers(-16, 16), st.integers(0, 9)), min_size=2, max_size=5),
    min_size=1,
    max_size=6,
).filter(lambda rankings: any(len({rank for rank, _, _ in rows}) > 1 for rows in rankings))


def table_of(rankings: list[list[tuple[int, int, int]]]) -> dict[str, Any]:
    columns = [tuple(zip(*rows, strict=True)) for rows in rankings]
    examples = [ranked(ranks, chars) for ranks, _, chars in columns]
    return pair_accuracy(examples, [[s / 8 for s in scores] for _, scores, _ in columns])["people"]


@given(RANKINGS, st.randoms(use_true_random=False))
def test_the_order_in_which_responses_are_listed_changes_no_number(
    rankings: list[list[tuple[int, int, int]]], random: Any
) -> None:
    listed_otherwise = [random.sample(rows, len(rows)) for rows in rankings]
    assert flat(table_of(listed_otherwise)) == pytest.approx(flat(table_of(rankings)), nan_ok=True)


@given(RANKINGS)
def test_numbers_stay_in_their_ranges_and_those_by_k_add_up(rankings: list[list[tuple[int, int, int]]]) -> None:
    row = table_of(rankings)
    assert 0 <= row["ece"] <= 1
    for name in ("length_bias", "length_bias_of_labels"):
        assert math.isnan(row[name]) or abs(row[name]) <= 1 + 1e-12
    cells = row["accuracy_by_k"].values()
    assert sum(c["pairs"] for c in cells) == row["pairs"]
    assert sum(c["pairs"] * c["accuracy"] for c in cells) == pytest.approx(row["pairs"] * row["accuracy"])


@given(RANKINGS)
def test_a_model_that_ranks_as_people_do_has_their_length_bias(rankings: list[list[tuple[int, int, int]]]) -> None:
    row = table_of([[(rank, -rank, chars) for rank, _, chars in rows] for rows in rankings])
    assert row["accuracy"] == 1.0
    assert row["length_bias"] == pytest.approx(row["length_bias_of_labels"], nan_ok=True)
