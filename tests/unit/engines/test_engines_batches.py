"""Micro-batches of rollouts: which positions are scored, and what padding can do to them (nothing)."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.data.batching import Cutting
from rayrlhf.engines.batches import cut_experiences, cut_rollouts, dummy_experience, dummy_rollout
from tests.engine_fakes import CPU, SHAPES, experiences, rollout, rollouts

shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12)


def test_positions_of_a_batch_by_hand():
    # prompt 2 + response 3 -> width 5; prompt 1 + response 2, padded by two
    (batch,) = cut_rollouts([rollout(0, 2, 3), rollout(1, 1, 2)], Cutting(10, packed=False), CPU)
    assert batch.layout.tokens.shape == (2, 5)
    assert batch.layout.tokens.dtype == torch.int64
    assert batch.positions.tolist() == [2, 3, 4, 6, 7]
    assert batch.lengths == [3, 2]
    assert batch.last_positions.tolist() == [4, 7]


@given(shapes, st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_the_positions_are_exactly_the_response_tokens(shapes, budget):
    sent = {r.info.sample_id: r for r in rollouts(shapes)}
    seen = []
    for batch in cut_rollouts(list(sent.values()), Cutting(budget, packed=False), CPU):
        flat = batch.layout.tokens.reshape(-1)[batch.positions].split(batch.lengths)
        for r, tokens in zip(batch.rollouts, flat, strict=True):
            assert tokens.tolist() == r.tokens[r.prompt_tokens :].tolist()
            seen.append(r.info.sample_id)
        last = batch.layout.tokens.reshape(-1)[batch.last_positions].tolist()
        assert last == [int(r.tokens[-1]) for r in batch.rollouts]
    assert sorted(seen) == sorted(sent)


@given(shapes, st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_micro_batch_is_within_the_budget_unless_it_is_one_long_row(shapes, budget):
    for batch in cut_rollouts(rollouts(shapes), Cutting(budget, packed=False), CPU):
        assert batch.layout.tokens.numel() <= budget or len(batch.rollouts) == 1
        assert batch.layout.tokens.shape[1] == max(r.info.tokens for r in batch.rollouts)


def test_a_row_longer_than_the_budget_is_whole_and_alone():
    long, *short = rollouts([(20, 20), (1, 2), (2, 1)])
    batches = cut_rollouts([*short, long], Cutting(10, packed=False), CPU)
    assert [[r.info.tokens for r in b.rollouts] for b in batches] == [[40], [3, 3]]
    assert batches[0].layout.tokens[0].tolist() == long.tokens.tolist()


def test_no_rollouts_make_no_batches():
    assert cut_rollouts([], Cutting(10, packed=False), CPU) == []
    assert cut_experiences([], Cutting(10, packed=False), CPU) == []


@given(st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_every_token_keeps_its_own_numbers_under_any_cut(budget):
    sent = {e.rollout.info.sample_id: e for e in experiences()}
    for batch in cut_experiences(list(sent.values()), Cutting(budget, packed=False), CPU):
        assert batch.mask.all()
        lengths = batch.batch.lengths
        for name in ("old_logprobs", "advantages", "returns", "old_values"):
            field = getattr(batch, name)
            assert field.dtype == torch.float32
            for r, part in zip(batch.batch.rollouts, field.split(lengths), strict=True):
                assert part.tolist() == getattr(sent[r.info.sample_id], name).tolist()


def test_a_dummy_is_its_model_with_nothing_to_learn():
    like = experiences(SHAPES)[3]
    dummy = dummy_experience(like, CPU)
    assert dummy.batch.layout.tokens.tolist() == [like.rollout.tokens.tolist()]
    assert not dummy.mask.any()
    assert dummy.mask.shape == dummy.old_logprobs.shape == (like.rollout.info.response_tokens,)
    assert np.array_equal(dummy_rollout(like.rollout, CPU).layout.tokens, dummy.batch.layout.tokens)
