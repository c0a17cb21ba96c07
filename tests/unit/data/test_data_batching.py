from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.batching import balance, epoch_order, micro_batches, pad_rows

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


def test_micro_batches_hold_rows_of_like_length():
    assert micro_batches([2, 9, 3, 8, 3], budget=18) == [[1, 3], [2, 4, 0]]


def test_a_row_over_the_budget_is_alone():
    assert micro_batches([4, 30, 4], budget=10) == [[1], [0, 2]]


def test_no_rows_make_no_micro_batches():
    assert micro_batches([], 10) == []


@given(LENGTHS, st.integers(1, 700))
def test_micro_batches_hold_every_index_once_within_the_budget(lengths, budget):
    groups = micro_batches(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        assert len(group) == 1 or len(group) * max(lengths[index] for index in group) <= budget
    assert micro_batches(lengths, budget) == groups


@given(LENGTHS, st.integers(1, 700))
def test_two_neighbouring_micro_batches_never_fit_in_one(lengths, budget):
    groups = micro_batches(lengths, budget)
    for left, right in pairwise(groups):
        assert (len(left) + 1) * lengths[left[0]] > budget
        assert lengths[left[-1]] >= lengths[right[0]]


@pytest.mark.parametrize("call", [lambda: balance([1], 0), lambda: micro_batches([1], 0)])
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
