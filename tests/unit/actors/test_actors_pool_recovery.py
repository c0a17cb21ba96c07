"""Engines that die while they sample or while they get weights: every response comes once, from verified weights."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.actors.pool import EnginePool
from rayrlhf.errors import ActorError, ActorLost, PolicyMovedOn, WeightSyncError
from rayrlhf.types import PromptTokens, RolloutInfo, SampleRequest
from rayrlhf.weights.publish import Publication

PROMPTS = [PromptTokens(i, [1] * 4) for i in range(64)]  # type: ignore[arg-type]


class Engines:
    """Engines of which each holds a version, or none; `fail` says at which of its calls an engine dies."""

    role, devices = "rollout", None

    def __init__(self, ranks: int, fail: Callable[[int, int], bool] = lambda rank, call: False) -> None:
        self.ranks = ranks
        self.holds: list[int | None] = [None] * ranks
        self.calls = [0] * ranks
        self.log: list[str] = []
        self.policy_version = 0
        self._fail = fail
        self._parts: dict[int, list[Any]] = {}

    def check(self, rank: int) -> None:
        self.calls[rank] += 1
        if self._fail(rank, self.calls[rank]):
            self.holds[rank] = None
            self._parts.pop(rank, None)
            self.log.append(f"{rank} dies")
            raise ActorLost(f"rollout rank {rank}: the actor died")

    async def call_rank(self, rank: int, method: str, *args: Any) -> Any:
        await asyncio.sleep(0)
        self.check(rank)
        if method == "generate":
            version, share, at_once, _ = args
            if self.holds[rank] != version:
                raise WeightSyncError(f"asked for {version}, holds {self.holds[rank]}")
            self.log.append(f"{rank} draws {[r.sample_id for r in share]}")
            self._parts[rank] = [share[i : i + at_once] for i in range(0, len(share), at_once)]
        if rank not in self._parts:
            raise ActorError("nothing was asked for")
        part = self._parts[rank].pop(0)
        return [RolloutInfo(r.sample_id, r.prompt_id, 10, 3, False, self.holds[rank] or 0) for r in part], "rollouts"

    async def replace(self, rank: int, cause: ActorError) -> None:
        self.log.append(f"{rank} is replaced")
        for _ in range(3):
            await asyncio.sleep(0)


class Publisher:
    """Gives engines what the policy is; `moved` makes it say that the policy has learned."""

    def __init__(self, engines: Engines) -> None:
        self.engines, self.moved = engines, False

    async def publish(self, version: int, source: Any, targets: Any) -> Publication:
        self.engines.log.append(f"publish {version} to {[t.rank for t in targets]}{' again' * source._again}")
        if source._again and self.moved:
            raise PolicyMovedOn("the policy has learned")
        self.moved = False
        result = Publication(version)
        for target in targets:
            await asyncio.sleep(0)
            try:
                self.engines.check(target.rank)
            except ActorLost as error:
                target.lost = error
                result.quarantined[target.name] = error.message
                continue
            self.engines.holds[target.rank] = version
            await target.commit(version)
            result.committed.append(target.name)
        if not result.committed:
            raise WeightSyncError("no engine could be verified")
        return result


def pool_of(engines: Engines, fixed: bool = False) -> EnginePool:
    return EnginePool(engines, engines, Publisher(engines), PROMPTS, fixed, replace=engines.replace)  # type: ignore[arg-type]


def requests(count: int, start: int = 0) -> list[SampleRequest]:
    return [SampleRequest(start + i, i % 64, seed=i) for i in range(count)]


async def drawn(pool: EnginePool, asked: list[SampleRequest]) -> list[RolloutInfo]:
    return [info async for part in pool.generate(asked) for info in part.infos]


def run(engines: Engines, fixed: bool = False, count: int = 12) -> list[RolloutInfo]:
    async def steps() -> list[RolloutInfo]:
        pool, got = pool_of(engines, fixed), list[RolloutInfo]()
        for version in range(3):
            await pool.publish(version)
            infos = await drawn(pool, requests(count, version * count))
            assert {info.version for info in infos} == {version}
            got += infos
        await pool.close()
        return got

    return asyncio.run(asyncio.wait_for(steps(), 10))


def ids(infos: list[RolloutInfo]) -> list[int]:
    return sorted(info.sample_id for info in infos)


def test_what_a_dead_engine_had_not_handed_over_goes_to_the_others_and_it_serves_again_with_the_next_version():
    engines = Engines(2, lambda rank, call: rank == 1 and call == 3)  # a publish, a first part, then its second
    assert ids(run(engines)) == list(range(36))
    dies = engines.log.index("1 dies")
    assert "1 is replaced" in engines.log[dies:]
    assert engines.log.count("publish 0 to [0, 1]") == 1
    assert "publish 1 to [0, 1]" in engines.log[dies:]
    assert not any(line.endswith("again") for line in engines.log)


def test_the_only_engine_that_dies_is_waited_for_and_gets_the_same_version_again():
    engines = Engines(1, lambda rank, call: call == 4)
    assert ids(run(engines)) == list(range(36))
    dies = engines.log.index("0 dies")
    assert engines.log[dies : dies + 3] == ["0 dies", "0 is replaced", "publish 0 to [0] again"]


def test_responses_that_are_bound_to_an_engine_are_drawn_by_its_replacement_with_the_same_others():
    plain, faulty = Engines(2), Engines(2, lambda rank, call: rank == 1 and call == 2)
    run(plain, fixed=True)
    assert ids(run(faulty, fixed=True)) == list(range(36))
    draws = [line for line in plain.log if "draws" in line]
    assert sorted(line for line in faulty.log if "draws" in line) == sorted(draws)
    assert "publish 0 to [1] again" in faulty.log


def test_an_engine_that_dies_in_a_publish_is_left_out_and_replaced():
    engines = Engines(2, lambda rank, call: rank == 0 and call == 1)
    assert ids(run(engines)) == list(range(36))
    assert engines.log[:2] == ["publish 0 to [0, 1]", "0 dies"]
    assert "publish 1 to [0, 1]" in engines.log


def test_a_publish_that_loses_all_engines_is_made_again():
    engines = Engines(2, lambda rank, call: call == 1)
    assert ids(run(engines)) == list(range(36))
    assert [line for line in engines.log if line.startswith("publish 0")][:1] == ["publish 0 to [0, 1]"]


def test_fixed_shares_wait_for_an_engine_that_died_in_a_publish():
    plain, faulty = Engines(2), Engines(2, lambda rank, call: rank == 0 and call == 1)
    run(plain, fixed=True)
    run(faulty, fixed=True)
    assert [line for line in faulty.log if "draws" in line] == [line for line in plain.log if "draws" in line]


def test_when_the_policy_has_learned_meanwhile_the_rest_is_drawn_by_its_next_version():
    """As with batches drawn ahead: the loop publishes while a batch waits for its only engine."""
    engines = Engines(1, lambda rank, call: call == 4)

    async def steps() -> list[RolloutInfo]:
        pool = pool_of(engines)
        await pool.publish(0)
        drawing = asyncio.ensure_future(drawn(pool, requests(12)))
        while "0 dies" not in engines.log:
            await asyncio.sleep(0)
        pool._publisher.moved = True  # type: ignore[attr-defined]
        while "publish 0 to [0] again" not in engines.log:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not drawing.done()
        await pool.publish(1)
        return await drawing

    infos = asyncio.run(asyncio.wait_for(steps(), 10))
    assert ids(infos) == list(range(12))
    assert {info.version for info in infos} == {0, 1}


def test_what_is_drawn_again_is_finished_as_long_after_the_batch_began_as_it_is():
    class Slow(Engines):
        async def replace(self, rank: int, cause: ActorError) -> None:
            await asyncio.sleep(0.02)

    seconds = {info.sample_id: info.seconds for info in run(Slow(1, lambda rank, call: call == 4))[:12]}
    # A publish, two parts of two responses, and then it dies.
    assert [seconds[sample] for sample in range(4)] == [0.0] * 4
    assert all(seconds[sample] >= 0.02 for sample in range(4, 12))


def test_an_engine_that_may_not_be_replaced_any_more_ends_the_batch_with_the_reason():
    engines = Engines(1, lambda rank, call: call == 3)

    async def spent(rank: int, cause: ActorError) -> None:
        raise ActorError(f"rollout-{rank} was lost too often")

    async def steps() -> None:
        pool = EnginePool(engines, engines, Publisher(engines), PROMPTS, replace=spent)  # type: ignore[arg-type]
        await pool.publish(0)
        await drawn(pool, requests(12))

    with pytest.raises(ActorError, match="too often"):
        asyncio.run(asyncio.wait_for(steps(), 10))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_step_that_other_engines_can_take_is_published_before_one_that_may_not_be_replaced_ends_the_run(fixed: bool):
    """What was learned can be saved then."""
    engines = Engines(2, lambda rank, call: rank == 1 and call == 2)

    async def spent(rank: int, cause: ActorError) -> None:
        while engines.policy_version == 0:
            await asyncio.sleep(0)
        raise ActorError(f"rollout-{rank} was lost too often")

    async def steps() -> list[str]:
        pool = EnginePool(engines, engines, Publisher(engines), PROMPTS, False, replace=spent)  # type: ignore[arg-type]
        await pool.publish(0)
        await drawn(pool, requests(12))
        pool._fixed = fixed
        engines.policy_version = 1
        while not pool.whole and not pool._engines[1].replacing.done():  # type: ignore[union-attr]
            await asyncio.sleep(0)
        assert not pool.whole
        published = await pool.publish(1)
        with pytest.raises(ActorError, match="rollout-1 was lost too often"):
            await drawn(pool, requests(12, 12))
        await pool.close()
        return published.committed

    assert asyncio.run(asyncio.wait_for(steps(), 10)) == ["rollout-0"]


@given(
    st.integers(1, 4),
    st.booleans(),
    st.sets(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=12),
    st.integers(1, 20),
)
@settings(max_examples=200, deadline=None)
def test_whatever_dies_and_when_every_response_comes_once_and_from_the_version_that_was_published(
    ranks: int, fixed: bool, deaths: set[tuple[int, int]], count: int
):
    engines = Engines(ranks, lambda rank, call: (rank, call) in deaths)
    infos = run(engines, fixed, count)
    assert Counter(info.sample_id for info in infos) == Counter(range(3 * count))
