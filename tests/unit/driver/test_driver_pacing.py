"""The stream of prompts, and the order of sampling and scoring."""

import asyncio
import hashlib
from collections import Counter

import pytest
from driver_fakes import World
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.checkpoint.ledger import Accounted
from rayrlhf.driver.pacing import PromptStream, SyncPacing, TextStream

IDS = [3, 1, 4, 15, 9, 26, 5]


def epochs(stream: PromptStream, count: int) -> list[list[int]]:
    return [[r.prompt_id for r in stream.take(len(IDS))] for _ in range(count)]


def test_each_epoch_visits_every_prompt_once():
    for epoch in epochs(PromptStream(IDS, seed=0), 20):
        assert Counter(epoch) == Counter(IDS)


def test_each_epoch_is_a_fresh_shuffle():
    orders = {tuple(epoch) for epoch in epochs(PromptStream(list(IDS), seed=0), 20)}
    assert len(orders) >= 19  # 5040 orders: two alike are unlikely, all alike impossible


@given(st.lists(st.integers(1, 10), min_size=1, max_size=12), st.integers(0, 2**31 - 1))
@settings(max_examples=50, deadline=None)
def test_the_stream_does_not_depend_on_the_batch_size(batches, seed):
    stream = PromptStream(IDS, seed)
    cut = [request for count in batches for request in stream.take(count)]
    assert cut == PromptStream(IDS, seed).take(sum(batches))


def test_the_same_seed_gives_the_same_stream_and_another_seed_another():
    first = PromptStream(IDS, 7).take(40)
    assert first == PromptStream(IDS, 7).take(40)
    other = PromptStream(IDS, 8).take(40)
    assert [r.prompt_id for r in first] != [r.prompt_id for r in other]
    assert not {r.seed for r in first} & {r.seed for r in other}


def test_sample_ids_count_up_and_seeds_are_unique_non_negative_64_bit():
    requests = PromptStream(IDS, 0).take(5000)
    assert [r.sample_id for r in requests] == list(range(5000))
    seeds = {r.seed for r in requests}
    assert len(seeds) == 5000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_two_samples_of_one_prompt_have_seeds_of_their_own():
    requests = PromptStream([5], 0).take(10)
    assert {r.prompt_id for r in requests} == {5}
    assert len({r.seed for r in requests}) == 10


def test_the_first_requests_of_a_known_seed_stay_as_they_are():
    """A change here changes what a finished run's config would sample: bump it knowingly."""
    (request,) = PromptStream([42], 3).take(1)
    digest = hashlib.blake2b(b"(3, 0, 42, 0)", digest_size=8).digest()
    assert request.seed == int.from_bytes(digest, "big") // 2


def test_a_batch_larger_than_the_prompts_goes_on_in_the_next_epoch():
    requests = PromptStream(IDS, 0).take(3 * len(IDS))
    assert Counter(r.prompt_id for r in requests) == dict.fromkeys(IDS, 3)


def test_sync_pacing_samples_and_scores_a_batch_only_when_it_is_asked_for():
    world = World()

    async def consume():
        pacing = SyncPacing(PromptStream(IDS, 0), 2, 3, world.clock)
        world.clock.start_step()
        async for batch in pacing.scored_batches(world, world):
            world.log.append(("consumed", *batch.rollouts.handles, *batch.scores))

    asyncio.run(consume())
    assert [event[0] for event in world.log] == ["generate", "frozen", "learning", "consumed"] * 3
    assert [event[1:] for event in world.log if event[0] == "consumed"] == [
        (f"rollouts {i}", f"frozen {i}", f"learning {i}") for i in range(3)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 10])
def test_sync_pacing_asks_for_whole_batches(batch_size):
    world = World()

    async def consume():
        world.clock.start_step()
        async for _ in SyncPacing(PromptStream(IDS, 0), batch_size, 4, world.clock).scored_batches(world, world):
            pass

    asyncio.run(consume())
    flat = [r for asked in world.asked for r in asked]
    assert [len(asked) for asked in world.asked] == [batch_size] * 4
    assert flat == PromptStream(IDS, 0).take(4 * batch_size)


def test_a_prompt_comes_as_often_as_asked_each_time_with_a_seed_of_its_own():
    requests = PromptStream(IDS, 0, repeats=3).take(3 * len(IDS))
    assert [r.prompt_id for r in requests[::3]] == [r.prompt_id for r in PromptStream(IDS, 0).take(len(IDS))]
    assert all(requests[i].prompt_id == requests[i - i % 3].prompt_id for i in range(len(requests)))
    assert len({r.seed for r in requests}) == len(requests)
    assert [r.sample_id for r in requests] == list(range(len(requests)))


def test_text_visits_every_block_once_an_epoch_in_a_fresh_order():
    stream = TextStream(50, seed=1)
    first, second = stream.take(50), stream.take(50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 40))
def test_text_goes_on_where_it_was_left(blocks, before, after):
    stream = TextStream(blocks, seed=2)
    stream.take(before)
    resumed = TextStream(blocks, seed=2, drawn=stream.drawn)
    assert resumed.take(after) == stream.take(after)


def test_text_and_prompts_are_shuffled_apart():
    prompts = [r.prompt_id for r in PromptStream(list(range(50)), seed=1).take(50)]
    assert TextStream(50, seed=1).take(50) != prompts


@pytest.mark.parametrize(("before", "after"), [(0, 7), (3, 9), (5, 5), (13, 12)])
def test_prompts_go_on_where_they_were_left(before: int, after: int):
    whole = PromptStream(IDS, seed=3, repeats=2).take(before + after)
    assert PromptStream(IDS, seed=3, repeats=2, accounted=Accounted(before)).take(after) == whole[before:]
