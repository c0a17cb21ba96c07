from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.batching import Cutting, balance, epoch_order, micro_batches, pad_rows

LENGTHS = st.lists(st.integers(0, 500), max_size=60)


def test_the_longest_go_first_each_to_the_lightest_rank():
    assert balance([3, 9, 4, 8, 2], 2) == [[0, 1, 4], [2, 3]]


def test_equal_lengths_are_dealt_in_turn():
    assert balance([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert balance([0, 0, 0, 0], 2) == [[0, 2], [1, 3]]


def test_more_ranks_than_sequences_leave_some_empty():
    assert balance([7], 3) == [[0], [], []]
    assert balance([], 2) == [[], []]


@given(LENGTHS, st.integers(1, 9))
def test_balance_gives_every_index_once_and_near_equal_sums(lengths, ranks):
    shares = balance(lengths, ranks)
    assert len(shares) == ranks
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in share) for share in shares]
    # The last sequence a rank got went to the lightest one: no two ranks differ by more than one sequence.
    assert max(sums) - min(sums) <= max(lengths, default=0)
    assert balance(lengths, ranks) == shares


def singles(lengths: list[int]) -> list[list[int]]:
    return [[length] for length in lengths]


def padded(lengths: list[int], tokens: int) -> list[list[int]]:
    return [cut.units for cut in micro_batches(singles(lengths), Cutting(tokens, packed=False))]


def test_padded_micro_batches_hold_rows_of_like_length():
    assert padded([2, 9, 3, 8, 3], 18) == [[1, 3], [2, 4, 0]]


def test_packed_rows_are_filled_from_the_longest_down():
    # rows of 9: 9 | 8 | 4 3 2, then 3 finds no room and opens a fourth
    (cut,) = micro_batches(singles([2, 9, 3, 8, 4, 3]), Cutting(36))
    assert cut.width == 9
    assert cut.rows == [[(1, 0)], [(3, 0)], [(4, 0), (2, 0), (0, 0)], [(5, 0)]]
    first, second = micro_batches(singles([2, 9, 3, 8, 4, 3]), Cutting(35))
    assert (first.units, second.units) == ([1, 3, 4, 2], [5, 0])
    assert second.rows == [[(5, 0)], [(0, 0)]]  # rows of 3 now: 3 | 2


def test_the_sequences_of_a_unit_stay_together():
    # unit 0 takes three rows of 5 and fills the limit of 15; packed its two short ones share a row
    units = [[5, 2, 3], [4, 1]]
    assert [c.units for c in micro_batches(units, Cutting(15, packed=False))] == [[0], [1]]
    (cut,) = micro_batches(units, Cutting(15))
    assert cut.rows == [[(0, 0)], [(0, 1), (0, 2)], [(1, 0), (1, 1)]]


def test_a_row_over_the_limit_is_alone():
    assert padded([4, 30, 4], 10) == [[1], [0, 2]]
    assert [c.units for c in micro_batches(singles([4, 30, 4]), Cutting(10))] == [[1], [0, 2]]


def test_no_rows_make_no_micro_batches():
    assert micro_batches([], Cutting(10)) == []


UNITS = st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=4), max_size=30)


@given(UNITS, st.integers(1, 700), st.booleans())
def test_micro_batches_hold_every_sequence_once_within_the_limit(units, tokens, packed):
    cuts = micro_batches(units, Cutting(tokens, packed))
    assert sorted(unit for cut in cuts for unit in cut.units) == list(range(len(units)))
    placed = sorted(place for cut in cuts for row in cut.rows for place in row)
    assert placed == [(u, s) for u, unit in enumerate(units) for s in range(len(unit))]
    for cut in cuts:
        assert {unit for row in cut.rows for unit, _ in row} == set(cut.units)
        assert all(row for row in cut.rows)
        assert all(sum(units[u][s] for u, s in row) <= cut.width for row in cut.rows)
        assert len(cut.units) == 1 or len(cut.rows) * cut.width <= tokens
        assert packed or all(len(row) == 1 for row in cut.rows)
    assert micro_batches(units, Cutting(tokens, packed)) == cuts


@given(LENGTHS, st.integers(1, 700))
def test_two_neighbouring_padded_micro_batches_never_fit_in_one(lengths, tokens):
    for left, right in pairwise(padded(lengths, tokens)):
        assert (len(left) + 1) * lengths[left[0]] > tokens
        assert lengths[left[-1]] >= lengths[right[0]]


@pytest.mark.parametrize("call", [lambda: balance([1], 0), lambda: micro_batches([[1]], Cutting(0))])
def test_less_than_one_rank_or_token_is_refused(call):
    with pytest.raises(ValueError, match="expected 1 or more"):
        call()


def test_rows_are_padded_on_the_right():
    padded = pad_rows([np.array([1, 2, 3]), np.array([4])], value=-1, dtype=np.int32)
    assert padded.tolist() == [[1, 2, 3], [4, -1, -1]]
    assert padded.dtype == np.int32


def test_no_rows_and_empty_rows_pad_to_nothing():
    assert pad_rows([], 0, np.float32).shape == (0, 0)
    assert pad_rows([np.array([]), np.array([])], 0, np.float32).shape == (2, 0)


def test_an_epochs_order_is_a_permutation_of_its_own():
    assert epoch_order(6, seed=3, epoch=0).tolist() == [2, 5, 4, 1, 3, 0]
    assert epoch_order(6, seed=3, epoch=1).tolist() == [1, 2, 0, 4, 5, 3]
    assert epoch_order(0, 1, 1).tolist() == []


@given(st.integers(0, 200), st.integers(0, 2**40), st.integers(0, 1000))
def test_an_epochs_order_holds_every_index_once(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == epoch_order(n, seed, epoch).tolist()
