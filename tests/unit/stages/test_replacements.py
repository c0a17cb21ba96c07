"""Replacing what is lost: as often as the budget says, and written down each time."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayrlhf.config.cluster import RecoveryConfig
from rayrlhf.errors import ActorError, ActorLost, ResourceError
from rayrlhf.stages.replacements import Replacements

LOST = ActorLost("reward rank 0 failed in score: the actor died", "see logs/reward-0.log in the folder of the run")


def replace(folder: Path, outcomes: Sequence[Exception | None], **settings: Any) -> tuple[str, list[dict[str, Any]]]:
    """Lose the role once; each start ends with the next of the outcomes. What was said, and written."""
    said, left = io.StringIO(), list(outcomes)

    async def start() -> None:
        if (outcome := left.pop(0)) is not None:
            raise outcome

    config = RecoveryConfig(backoff_s=0.0, **settings)
    replacements = Replacements(config, folder / "recoveries.jsonl", Console(file=said, width=200))
    try:
        asyncio.run(replacements.replace("reward", LOST, start))
    finally:
        assert not left
        path = folder / "recoveries.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
    return said.getvalue(), records


def test_a_role_that_comes_back_is_told_of_and_written_down_with_its_cause(tmp_path: Path):
    said, records = replace(tmp_path, [None])
    assert "reward is lost and is replaced: reward rank 0 failed in score: the actor died" in said
    assert "reward is there again after" in said
    assert [(r["who"], r["event"]) for r in records] == [("reward", "lost"), ("reward", "replaced")]
    assert records[0]["cause"] == LOST.message
    assert 0 <= records[1]["seconds"] < 5


def test_a_start_that_fails_is_tried_again_until_the_budget_is_spent(tmp_path: Path):
    failures = [ActorError("no start"), ResourceError("no room", "add nodes"), None]
    _, records = replace(tmp_path, failures, max_restarts=3)
    assert [r["event"] for r in records] == ["lost", "lost", "lost", "replaced"]


def test_the_end_names_cause_log_and_key(tmp_path: Path):
    with pytest.raises(ActorError) as caught:
        replace(tmp_path, [ActorError("no start", "see logs/reward-0.log in the folder of the run")], max_restarts=1)
    message = str(caught.value)
    for words in ("reward was lost 2 times within 3600 s", "max_restarts is 1", "no start", "reward-0.log", "--resume"):
        assert words in message
    assert not isinstance(caught.value, ActorLost)


def make(folder: Path, **settings: Any) -> Replacements:
    config = RecoveryConfig(backoff_s=0.0, **settings)
    return Replacements(config, folder / "recoveries.jsonl", Console(file=io.StringIO()))


def test_a_replacement_goes_on_when_nobody_waits_for_it_any_more_and_whoever_comes_next_joins_it(tmp_path: Path):
    """A frozen role is being replaced when a learner is lost: the step is dropped, and the next one needs the role."""

    async def steps() -> None:
        replacements, starts, ready = make(tmp_path), list[str](), asyncio.Event()

        async def start() -> None:
            starts.append("reward")
            await ready.wait()

        first = asyncio.ensure_future(replacements.replace("reward", LOST, start))
        while not starts:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        second = asyncio.ensure_future(replacements.replace("reward", LOST, start))
        settled = asyncio.ensure_future(replacements.settled())
        await asyncio.sleep(0.01)
        assert not second.done()
        assert not settled.done()
        ready.set()
        await asyncio.gather(second, settled)
        assert starts == ["reward"]
        await replacements.replace("reward", LOST, start)  # lost once more, later
        assert starts == ["reward", "reward"]

    asyncio.run(asyncio.wait_for(steps(), 5))


def test_one_that_failed_too_often_while_nobody_waited_is_refused_in_the_same_words(tmp_path: Path):
    async def steps() -> None:
        replacements = make(tmp_path, max_restarts=0)

        async def start() -> None: ...

        for _ in range(2):
            with pytest.raises(ActorError, match="reward was lost once, and"):
                await replacements.replace("reward", LOST, start)

    asyncio.run(asyncio.wait_for(steps(), 5))


def test_closing_ends_what_is_under_way(tmp_path: Path):
    async def steps() -> int:
        replacements, begun = make(tmp_path), asyncio.Event()

        async def start() -> None:
            begun.set()
            await asyncio.sleep(60)

        waiting = asyncio.ensure_future(replacements.replace("reward", LOST, start))
        await begun.wait()
        await replacements.close()
        await asyncio.gather(waiting, return_exceptions=True)
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(steps()) == 0


def test_without_restarts_nothing_is_started(tmp_path: Path):
    with pytest.raises(ActorError, match="reward was lost once"):
        replace(tmp_path, [], max_restarts=0)
