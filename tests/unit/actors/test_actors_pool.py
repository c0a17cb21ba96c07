"""The pool of engines: who draws what, how responses come in, and what a publish waits for."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from rayrlhf.actors.pool import EnginePool, ExpectedTokens
from rayrlhf.actors.rollout import RolloutActor
from rayrlhf.errors import WeightSyncError
from rayrlhf.types import PromptTokens, RolloutInfo, SampleRequest
from rayrlhf.weights.publish import Publication

PROMPTS = [PromptTokens(i, [1] * (5 + i)) for i in range(20)]  # type: ignore[arg-type]


class Engines:
    """A group whose engines yield parts; a response takes as many tokens as its prompt's number."""

    role = "rollout"

    def __init__(self, ranks: int, fail: int | None = None) -> None:
        self.ranks = ranks
        self.asked: dict[int, list[int]] = {}
        self.at_once: list[int] = []
        self.versions: list[int] = []
        self.log: list[str] = []
        self._fail = fail
        self._parts: dict[int, list[Sequence[SampleRequest]]] = {}

    devices = None

    async def call_rank(self, rank: int, method: str, *args: Any) -> tuple[list[RolloutInfo], str]:
        if method == "generate":
            version, share, at_once, _ = args
            self.versions.append(version)
            self.asked[rank] = [r.sample_id for r in share]
            self.at_once.append(at_once)
            self._parts[rank] = [share[start : start + at_once] for start in range(0, len(share), at_once)]
        part = self._parts[rank].pop(0)
        await asyncio.sleep(0)
        if rank == self._fail:
            raise RuntimeError("engine broke")
        self.log.append(f"part of {rank}")
        infos = [RolloutInfo(r.sample_id, r.prompt_id, 10, 1 + r.prompt_id, False) for r in part]
        return infos, f"rollouts of {rank}: {part[0].sample_id}"


class Publisher:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    async def publish(self, version: int, source: Any, targets: Any) -> Publication:
        self.log.append("publish")
        for target in targets:
            await target.commit(version)
        return Publication(version, committed=[t.name for t in targets])


def pool_of(engines: Engines, fixed: bool = False) -> EnginePool:
    return EnginePool(engines, engines, Publisher(engines.log), PROMPTS, fixed)  # type: ignore[arg-type]


def requests(count: int) -> list[SampleRequest]:
    return [SampleRequest(100 + i, i, seed=i) for i in range(count)]


async def drawn(pool: EnginePool, count: int) -> list[Any]:
    await pool.publish(0)
    return [part async for part in pool.generate(requests(count))]


@pytest.mark.parametrize(("ranks", "parts"), [(1, 8), (2, 8), (3, 9), (8, 8), (16, 8)])
def test_every_response_comes_once_in_about_eight_parts_however_many_the_engines(ranks: int, parts: int):
    engines = Engines(ranks)
    prompts = [PromptTokens(i, [1]) for i in range(144)]  # type: ignore[arg-type]
    pool = EnginePool(engines, engines, Publisher(engines.log), prompts)  # type: ignore[arg-type]
    got = asyncio.run(drawn(pool, 144))
    assert sorted(info.sample_id for part in got for info in part.infos) == list(range(100, 244))
    assert len(got) == parts
    assert sum(len(part.handles) for part in got) == max(ranks, parts)


def test_fixed_shares_go_by_number_and_come_as_one_batch():
    engines = Engines(2)
    (batch,) = asyncio.run(drawn(pool_of(engines, fixed=True), 7))
    assert engines.asked == {0: [100, 102, 104, 106], 1: [101, 103, 105]}
    assert engines.at_once == [4, 3]
    assert len(batch.infos) == 7


def test_prompts_that_took_long_last_time_are_spread_over_the_engines():
    engines = Engines(2)
    pool = pool_of(engines)

    async def run() -> None:
        await drawn(pool, 20)
        await drawn(pool, 20)

    asyncio.run(run())
    tokens = [sum(5 + i + 1 + i for i in (s - 100 for s in share)) for share in engines.asked.values()]
    assert abs(tokens[0] - tokens[1]) <= 2


def test_a_prompt_never_seen_is_expected_to_take_as_long_as_the_others_did():
    expected = ExpectedTokens({1: 10, 2: 4})
    assert expected.of(1) == 10
    expected.learn([RolloutInfo(0, 1, 40, 30, False), RolloutInfo(1, 7, 20, 10, False)])
    assert expected.of(1) == 10 + 30
    assert expected.of(2) == 4 + (30 + 10) // 2


def test_a_publish_waits_for_the_last_response_and_goes_before_the_next_batch():
    engines = Engines(1)
    pool = pool_of(engines)

    async def draw(name: str) -> None:
        async for _ in pool.generate(requests(4)):
            pass
        engines.log.append(name)

    async def run() -> None:
        await pool.publish(0)
        first = asyncio.ensure_future(draw("first"))
        await asyncio.sleep(0)
        publishing = asyncio.ensure_future(pool.publish(1))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(draw("second"))
        await asyncio.gather(first, publishing, second)

    asyncio.run(run())
    part = "part of 0"
    assert engines.log == ["publish", part, part, part, part, "first", "publish", part, part, part, part, "second"]


def test_an_engine_that_fails_ends_the_batch_and_the_pool_is_free_again():
    engines = Engines(2, fail=1)
    pool = pool_of(engines)

    async def run() -> Publication:
        with pytest.raises(RuntimeError, match="engine broke"):
            await drawn(pool, 20)
        return await asyncio.wait_for(pool.publish(1), 5)

    assert asyncio.run(run()).version == 1


def test_a_batch_that_nobody_wants_any_more_is_let_go_without_a_word(capfd: pytest.CaptureFixture[str]):
    async def run() -> None:
        pool = pool_of(Engines(2, fail=1))
        await pool.publish(0)
        drawing = asyncio.ensure_future(_all(pool))
        for _ in range(2):
            await asyncio.sleep(0)
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)

    asyncio.run(run())
    gc.collect()
    assert capfd.readouterr().err == ""


async def _all(pool: EnginePool) -> None:
    async with aclosing(pool.generate(requests(20))) as parts:
        async for _ in parts:
            pass


def test_nothing_is_sampled_before_weights_are_verified():
    async def run() -> None:
        async for _ in pool_of(Engines(1)).generate(requests(1)):
            pass

    with pytest.raises(WeightSyncError, match="no engine holds verified weights"):
        asyncio.run(run())


class Commits:
    """An engine that writes down what it is told."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Iterator[Any]:
            self.log.append((name, *args))
            return iter(())

        return call


@pytest.mark.parametrize("ranks", [2, 8])
def test_engines_are_asked_for_samples_of_the_version_they_were_committed_to_last(ranks: int):
    engines = Engines(ranks)
    pool = pool_of(engines)

    async def run() -> None:
        await drawn(pool, 20)
        await pool.publish(7)
        [part async for part in pool.generate(requests(20))]

    asyncio.run(run())
    assert engines.versions == [0] * ranks + [7] * ranks


def test_an_engine_that_a_publish_left_out_is_asked_for_nothing():
    class LeavesOut(Publisher):
        async def publish(self, version: int, source: Any, targets: Any) -> Publication:
            return await super().publish(version, source, targets[1:])

    engines = Engines(2)
    pool = EnginePool(engines, engines, LeavesOut(engines.log), PROMPTS)  # type: ignore[arg-type]
    asyncio.run(drawn(pool, 20))
    assert list(engines.asked) == [1]


def test_the_first_bucket_begins_an_update_and_a_request_to_sample_commits_it():
    actor = RolloutActor.__new__(RolloutActor)
    actor._engine, actor._arrivals = Commits(), SimpleNamespace(localise=lambda ticket: ticket)  # type: ignore[assignment]
    first, second = ({"header": {"version": 5, "index": i}} for i in range(2))
    actor.load_bucket(first)
    actor.load_bucket(second)
    with pytest.raises(StopIteration):  # nothing was asked for
        actor.generate(5, [], 1)
    loads = [("begin_update", 5), ("load_bucket", first), ("load_bucket", second)]
    assert actor._engine.log == [*loads, ("commit", 5), ("generate", [], 1, None)]


def test_an_engine_that_dies_with_two_parts_asked_for_is_one_error(caplog: pytest.LogCaptureFixture):
    class Dies(Engines):
        async def call_rank(self, rank: int, method: str, *args: Any) -> Any:
            await asyncio.sleep(0)
            raise RuntimeError("engine died")

    async def run() -> None:
        with pytest.raises(RuntimeError, match="engine died"):
            await drawn(pool_of(Dies(1)), 20)

    asyncio.run(run())
    gc.collect()
    assert caplog.records == [], "asyncio tells of errors that nobody looked at"


def test_an_update_ends_a_batch_that_nobody_wanted_to_the_end():
    ended = []

    def generate(*_: Any) -> Iterator[list[Any]]:
        try:
            yield []
            yield []
        finally:
            ended.append("batch")

    actor = RolloutActor.__new__(RolloutActor)
    actor._engine, actor._arrivals = Commits(), SimpleNamespace(localise=lambda ticket: ticket)  # type: ignore[assignment]
    actor._parts = generate()
    next(actor._parts)
    actor.load_bucket({"header": {"version": 5, "index": 0}})
    assert ended == ["batch"]
