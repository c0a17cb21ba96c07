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


def test_without_restarts_nothing_is_started(tmp_path: Path):
    with pytest.raises(ActorError, match="reward was lost once"):
        replace(tmp_path, [], max_restarts=0)
