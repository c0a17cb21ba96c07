"""The probe: which tokens are asked, and when two sets of log-probs count as equal."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.weights.probe import ProbeRow, gap_error, probe_rows

NAN, INF = math.nan, math.inf


def probed(rows: list[ProbeRow]) -> list[int]:
    return sorted(token for row in rows for token in row.targets)


@given(st.integers(2, 200_000), st.integers(1, 300), st.integers(2, 64))
@settings(max_examples=100, deadline=None)
def test_at_least_the_tokens_asked_for_are_probed_in_range_and_within_the_context(vocab, tokens, context):
    rows = probe_rows(vocab, tokens, context)
    assert len(probed(rows)) >= tokens
    assert all(0 <= token < vocab for row in rows for token in [*row.context, *row.targets])
    assert all(type(token) is int for row in rows for token in [*row.context, *row.targets])
    assert {len(row.context) for row in rows} == {min(4, context - 1)}


@pytest.mark.parametrize(("tokens", "rows"), [(64, 1), (65, 2), (128, 2)])
def test_a_row_has_sixty_four_targets_each_another_token(tokens, rows):
    found = probe_rows(50_257, tokens, 1024)
    assert [len(row.targets) for row in found] == [64] * rows
    assert len(set(probed(found))) == 64 * rows


def test_the_ids_reach_both_ends_of_the_vocabulary():
    ids = probed(probe_rows(50_257, 64, 1024))
    assert min(ids) == 0
    assert max(ids) == 50_256


def test_contexts_differ_and_each_row_spans_the_vocabulary():
    rows = probe_rows(17_000, 128, 1024)
    assert len({tuple(row.context) for row in rows}) == 2
    for row in rows:
        assert min(row.targets) < 1100
        assert max(row.targets) >= 16_500
        assert min(row.context) < 1100
        assert max(row.context) >= 12_000


@given(st.integers(500, 200_000))
@settings(max_examples=30, deadline=None)
def test_neighbouring_probed_ids_are_evenly_spaced(vocab):
    ids = probed(probe_rows(vocab, 64, 1024))
    spaces = [b - a for a, b in itertools.pairwise(ids)]
    assert max(spaces) - min(spaces) <= 1


def test_float32_is_held_to_its_largest_difference_of_1e_4():
    assert gap_error([-1.0, -2.0], [-1.0, -2.00009], "float32", None) is None
    error = gap_error([-1.0, -2.0], [-1.0, -2.0002], "float32", None)
    assert error == "largest log-prob difference 0.0002 is over 0.0001 on 2 probed tokens"


def test_bfloat16_is_held_to_its_mean_difference_of_0_03():
    assert gap_error([0.0] * 4, [0.11, 0.0, 0.0, 0.0], "bfloat16", None) is None  # mean 0.0275, largest 0.11
    error = gap_error([0.0] * 4, [0.13, 0.0, 0.0, 0.0], "bfloat16", None)
    assert error == "mean log-prob difference 0.0325 is over 0.03 on 4 probed tokens"


def test_differences_do_not_cancel():
    assert gap_error([0.0, 0.0], [1.0, -1.0], "bfloat16", None) is not None
    assert gap_error([0.0, 0.0], [-1.0, 0.0], "float32", None) is not None


def test_a_tolerance_of_ones_own_replaces_both():
    assert gap_error([0.0], [0.5], "float32", 0.6) is None
    assert gap_error([0.0], [0.5], "float32", 0.4) is not None
    assert gap_error([0.0, 0.0], [1.0, 0.0], "bfloat16", 0.6) is None
    assert gap_error([0.0, 0.0], [1.0, 0.0], "bfloat16", 0.4) is not None


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pair", [(NAN, 0.0), (0.0, NAN), (NAN, NAN), (-INF, 0.0), (0.0, -INF), (-INF, -INF)])
def test_a_nan_or_an_infinity_never_passes(dtype, pair):
    trainer, engine = pair
    assert gap_error([-1.0, trainer, -1.0], [-1.0, engine, -1.0], dtype, 1e9) is not None


def test_different_lengths_never_pass():
    assert gap_error([0.0], [], "float32", None) == "the trainer probed 1 tokens, the engine 0"
    assert gap_error([0.0, 0.0], [0.0] * 3, "bfloat16", 9.0) == "the trainer probed 2 tokens, the engine 3"
