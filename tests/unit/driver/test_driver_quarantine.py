"""Samples that cannot be scored: left out, replaced, with their whole group, and only so many."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import pytest
from driver_fakes import KL, World

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.driver.loop import run_ppo
from rayrlhf.driver.pacing import OverlapPacing, PromptStream, SyncPacing
from rayrlhf.driver.protocols import RolloutBatch, ScoredBatch, ScoredPart
from rayrlhf.errors import TrainingError
from rayrlhf.types import RolloutInfo

IDS = list(range(100, 140))


class Failing(World):
    """Its scorers fail the samples of `failing`, with a reason for each; its engines answer one at a time."""

    def __init__(self, failing: Mapping[int, str]) -> None:
        super().__init__()
        self._failing = failing
        self.batches: list[ScoredBatch] = []

    async def generate(self, requests):
        self.asked.append(list(requests))
        for r in reversed(requests):
            yield RolloutBatch((RolloutInfo(r.sample_id, r.prompt_id, 10, 4, False, self._version),), (r.sample_id,))

    async def frozen(self, batch):
        failed = {i.sample_id: self._failing[i.sample_id] for i in batch.infos if i.sample_id in self._failing}
        return ScoredPart(tuple(f"frozen {handle}" for handle in batch.handles), failed)

    async def learning(self, batch):
        return tuple(f"learning {info.sample_id}" for info in batch.infos)

    async def estimate(self, batch, kl_coef):
        self.batches.append(batch)
        return await super().estimate(batch, kl_coef)


def drive(world: World, pacing: str, steps: int, size: int, repeats: int = 1, max_failed: int = 9) -> None:
    stream = PromptStream(IDS, seed=0, repeats=repeats)
    if pacing == "sync":
        when = SyncPacing(stream, size, steps, world.clock, max_failed=max_failed)
    else:
        when = OverlapPacing(stream, size, steps, world.clock, 1, max_failed=max_failed)
    asyncio.run(asyncio.wait_for(run_ppo(world.parts(), when, KL()), 20))


def trained(batch: ScoredBatch) -> list[int]:
    return sorted(info.sample_id for info in batch.rollouts.infos)


def quarantined(batch: ScoredBatch) -> dict[int, str]:
    return {sample.sample_id: sample.reason for sample in batch.quarantined}


pacings = pytest.mark.parametrize("pacing", ["sync", "overlap"])


@pacings
def test_a_sample_that_fails_is_left_out_with_its_reason_and_the_next_one_takes_its_place(pacing: str) -> None:
    world = Failing({1: "no answer", 4: "not a number", 5: "no answer"})
    drive(world, pacing, steps=2, size=4)
    # Of 0 to 3 sample 1 fails; 4 is drawn for it and fails too, then 5, then 6 is good.
    assert [trained(batch) for batch in world.batches] == [[0, 2, 3, 6], [7, 8, 9, 10]]
    assert quarantined(world.batches[0]) == {1: "no answer", 4: "not a number", 5: "no answer"}
    assert quarantined(world.batches[1]) == {}
    assert [[r.sample_id for r in asked] for asked in world.asked] == [[0, 1, 2, 3], [4], [5], [6], [7, 8, 9, 10]]
    assert [record["rollout/quarantined"] for record in world.records] == [3, 0]


@pacings
def test_models_that_learn_score_all_that_is_trained_on(pacing: str) -> None:
    world = Failing({2: "broken"})
    drive(world, pacing, steps=2, size=4)
    for batch in world.batches:
        assert {f"learning {sample}" for sample in trained(batch)} <= set(batch.scores)
        assert {f"frozen {sample}" for sample in trained(batch)} <= set(batch.scores)
        assert set(trained(batch)) <= set(batch.rollouts.handles)


@pacings
def test_the_whole_group_of_a_failed_sample_goes_and_a_whole_new_one_comes(pacing: str) -> None:
    world = Failing({4: "broken", 7: "late"})
    drive(world, pacing, steps=2, size=6, repeats=3)
    # Groups 0-2, 3-5, 6-8, 9-11, ...: the second goes for sample 4, its substitute for sample 7.
    assert [trained(batch) for batch in world.batches] == [[0, 1, 2, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
    assert quarantined(world.batches[0]) == {
        3: "its group: broken",
        4: "broken",
        5: "its group: broken",
        6: "its group: late",
        7: "late",
        8: "its group: late",
    }
    prompts = {r.sample_id: r.prompt_id for asked in world.asked for r in asked}
    assert all(prompts[sample] == prompts[sample - sample % 3] for sample in prompts)


@pacings
def test_a_replacement_is_finished_as_long_after_its_batch_began_as_it_was_drawn(pacing: str) -> None:
    class Slow(Failing):
        async def generate(self, requests):
            await asyncio.sleep(0.02)
            async for part in super().generate(requests):
                yield part

    world = Slow({1: "broken", 4: "broken"})
    drive(world, pacing, steps=1, size=4)
    seconds = {info.sample_id: info.seconds for info in world.batches[0].rollouts.infos}
    assert [seconds[sample] for sample in (0, 2, 3)] == [0.0, 0.0, 0.0]
    assert 0.04 <= seconds[5] <= world.batches[0].rollouts.seconds - 0.02, "two rounds of sampling went before it"


@pacings
def test_a_quarantined_sample_names_its_prompt(pacing: str) -> None:
    world = Failing({1: "broken"})
    drive(world, pacing, steps=1, size=4)
    (sample,) = world.batches[0].quarantined
    assert sample.prompt_id == PromptStream(IDS, seed=0).take(2)[1].prompt_id


@pacings
def test_a_step_in_which_as_many_fail_as_may_goes_on_and_one_more_stops_the_run(pacing: str) -> None:
    world = Failing(dict.fromkeys([0, 2, 4], "no route to the service"))
    drive(world, pacing, steps=1, size=10, max_failed=3)
    assert [trained(batch) for batch in world.batches] == [[1, 3, 5, 6, 7, 8, 9, 10, 11, 12]]
    stopped = Failing({0: "no route to the service", 2: "too long", 4: "no route to the service"})
    with pytest.raises(TrainingError) as error:
        drive(stopped, pacing, steps=1, size=10, max_failed=2)
    assert "3 samples of a step of 10 could not be scored, 2 may; 2 times: no route to the service" in str(error.value)
    assert "ppo.max_failed_share" in error.value.hint
    assert stopped.batches == []


@pacings
def test_scorers_that_fail_everything_stop_the_run_at_once(pacing: str) -> None:
    world = Failing(dict.fromkeys(range(1000), "the service is down"))
    with pytest.raises(TrainingError, match="the service is down"):
        drive(world, pacing, steps=5, size=8, max_failed=1)
    assert len(world.asked) == 1


@pacings
def test_only_the_failed_samples_count_towards_the_share_not_their_groups(pacing: str) -> None:
    world = Failing({0: "broken"})
    drive(world, pacing, steps=1, size=8, repeats=8, max_failed=1)
    assert [trained(batch) for batch in world.batches] == [list(range(8, 16))]


@pytest.mark.parametrize(
    ("size", "share", "allowed"), [(512, 0.1, 51), (4, 0.1, 1), (4, 0.0, 1), (100, 0.29, 29), (8, 1.0, 8)]
)
def test_the_share_is_of_the_batch_and_one_sample_may_always_fail(size: int, share: float, allowed: int) -> None:
    assert PPOConfig(batch_size=size, minibatch_size=4, max_failed_share=share).max_failed == allowed


def test_a_reason_is_one_short_line() -> None:
    world = Failing({0: "the service said:\n  <html>" + "x" * 5000})
    drive(world, "sync", steps=1, size=4)
    reason = quarantined(world.batches[0])[0]
    assert reason.startswith("the service said: <html>xxx")
    assert len(reason) == 200


@pytest.mark.parametrize(
    ("answered", "wrong"),
    [([0, 1, 2], r"\(3, \d+\)"), ([0, 1, 2, 3, 3], r"\(3, \d+\)"), ([0, 1, 2, 9], r"\(3, \d+\), \(9, 7\)")],
    ids=["lost", "doubled", "strange"],
)
@pacings
def test_engines_that_lose_or_double_a_sample_stop_the_run(pacing: str, answered: Collection[int], wrong: str) -> None:
    class Careless(Failing):
        async def generate(self, requests):
            prompts = {r.sample_id: r.prompt_id for r in requests}
            infos = tuple(RolloutInfo(sample, prompts.get(sample, 7), 10, 4, False) for sample in answered)
            yield RolloutBatch(infos, ("all",))

    world = Careless({})
    with pytest.raises(TrainingError, match=rf"\(sample, prompt\) \[{wrong}\]"):
        drive(world, pacing, steps=1, size=4)
    assert world.batches == []
