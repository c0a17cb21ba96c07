"""How often the reward model, and the longer-wins rule, agree with the people who ranked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.prompts import RankingExample
from rayrlhf.stages.reward import pair_accuracy


def ranked(ranks: tuple[int, ...], chars: tuple[int, ...], source: str = "people") -> RankingExample:
    tokens = tuple(np.zeros(3, dtype=np.int32) for _ in ranks)
    return RankingExample(tokens, ranks, prompt_tokens=1, source=source, response_chars=chars)


def test_a_pair_is_won_when_the_better_rank_scores_higher() -> None:
    table = pair_accuracy([ranked((1, 2), (5, 9)), ranked((2, 1), (5, 9))], [(0.5, -1.0), (0.5, -1.0)])
    assert table == {"people": {"pairs": 2, "accuracy": 0.5, "longer_wins": 0.5}}


def test_every_pair_of_a_ranking_counts_and_rank_one_is_the_best() -> None:
    # Pairs (better, worse): (0, 1) won, (0, 2) lost, (1, 2) lost; by length: lost, lost, won.
    table = pair_accuracy([ranked((1, 2, 3), (10, 30, 20))], [(2.0, 1.0, 3.0)])
    assert table == {"people": {"pairs": 3, "accuracy": pytest.approx(1 / 3), "longer_wins": pytest.approx(1 / 3)}}


def test_equal_ranks_are_no_pair() -> None:
    table = pair_accuracy([ranked((1, 1, 2), (3, 4, 2))], [(5.0, 0.0, 1.0)])
    assert table == {"people": {"pairs": 2, "accuracy": 0.5, "longer_wins": 1.0}}


def test_a_source_with_nothing_but_ties_is_left_out() -> None:
    table = pair_accuracy([ranked((1, 1), (3, 4), "ties"), ranked((1, 2), (3, 4), "pairs")], [(1.0, 0.0), (1.0, 0.0)])
    assert table == {"pairs": {"pairs": 1, "accuracy": 1.0, "longer_wins": 0.0}}


def test_equal_scores_and_equal_lengths_count_half() -> None:
    table = pair_accuracy([ranked((1, 2), (7, 7))], [(0.25, 0.25)])
    assert table == {"people": {"pairs": 1, "accuracy": 0.5, "longer_wins": 0.5}}


def test_sources_are_never_pooled() -> None:
    examples = [
        ranked((1, 2), (9, 1), "long is good"),
        ranked((1, 2), (1, 9), "long is bad"),
        ranked((1, 2), (1, 9), "long is bad"),
        ranked((1, 2), (4, 4), ""),
    ]
    table = pair_accuracy(examples, [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 0.0)])
    assert table == {
        "": {"pairs": 1, "accuracy": 1.0, "longer_wins": 0.5},
        "long is bad": {"pairs": 2, "accuracy": 0.5, "longer_wins": 0.0},
        "long is good": {"pairs": 1, "accuracy": 1.0, "longer_wins": 1.0},
    }
    assert list(table) == ["", "long is bad", "long is good"]


def test_length_is_that_of_the_text_as_written_not_of_its_tokens() -> None:
    example = RankingExample((np.zeros(9, np.int32), np.zeros(2, np.int32)), (1, 2), 1, "people", (10, 500))
    assert pair_accuracy([example], [(1.0, 0.0)])["people"]["longer_wins"] == 0.0


def test_no_examples_give_no_table() -> None:
    assert pair_accuracy([], []) == {}


def test_as_many_scores_as_examples_are_needed() -> None:
    with pytest.raises(ValueError):
        pair_accuracy([ranked((1, 2), (1, 1))], [])


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(-8, 8), st.integers(0, 9)),
        min_size=2,
        max_size=6,
    ).filter(lambda rows: len({rank for rank, _, _ in rows}) > 1)
)
def test_turning_all_scores_around_turns_the_accuracy_around(rows: list[tuple[int, int, int]]) -> None:
    ranks, scores, chars = zip(*rows, strict=True)
    straight = pair_accuracy([ranked(ranks, chars)], [[float(s) for s in scores]])["people"]
    turned = pair_accuracy([ranked(ranks, chars)], [[-float(s) for s in scores]])["people"]
    assert straight["accuracy"] + turned["accuracy"] == pytest.approx(1.0)
    assert straight["longer_wins"] == turned["longer_wins"]


@given(st.permutations([(1, 3.0, 5), (2, 3.0, 5), (2, 1.0, 8), (3, 2.0, 1)]))
def test_the_order_of_the_responses_does_not_matter(rows: list[tuple[int, float, int]]) -> None:
    ranks, scores, chars = zip(*rows, strict=True)
    # Five pairs by score: one tie, one lost, three won. By length: one tie, one lost, three won.
    assert pair_accuracy([ranked(ranks, chars)], [scores]) == {
        "people": {"pairs": 5, "accuracy": pytest.approx(0.7), "longer_wins": pytest.approx(0.7)}
    }
