"""A user's function as the source of rewards: whatever it does, a number or a reason."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rewards_fakes import requests

from rayrlhf.config.rewards import RewardSourceConfig
from rayrlhf.errors import ConfigError
from rayrlhf.rewards.base import Failure, Outcome, RewardRequest
from rayrlhf.rewards.function import MOST_STUCK, FunctionSource, load_function, source_file
from rayrlhf.rewards.retry import Retries


def score(function: Callable[..., Any], asked: list[RewardRequest], times: int = 1, **keys: Any) -> list[Outcome]:
    """Of the last of so many times."""
    given = {"retries": 0, "timeout_s": 5.0, "backoff_s": 1e-6} | keys
    config = RewardSourceConfig.model_validate({"kind": "function", "function": "m:f"} | given)

    async def run() -> list[Outcome]:
        source = FunctionSource(function, config, Retries.of(config, 0))
        try:
            for _ in range(times):
                found = await source.score(asked)
            return found
        finally:
            await source.close()

    return asyncio.run(run())


def by_number(prompts: list[str], responses: list[str]) -> list[float]:
    assert all(type(text) is str for text in prompts + responses)
    return [float(response) for response in responses]


def test_it_is_called_on_batches_and_its_rewards_stay_in_order() -> None:
    sizes = []

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        sizes.append(len(prompts))
        return by_number(prompts, responses)

    assert score(reward, requests(5), batch=2) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert sizes == [2, 2, 1]


def test_an_async_function_is_awaited() -> None:
    async def reward(prompts: list[str], responses: list[str]) -> list[float]:
        await asyncio.sleep(0.01)
        return by_number(prompts, responses)

    assert score(reward, requests(3)) == [0.0, 1.0, 2.0]


def test_a_plain_function_may_start_a_loop_of_its_own() -> None:
    async def ask(response: str) -> float:
        await asyncio.sleep(0)
        return float(response)

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        return [asyncio.run(ask(response)) for response in responses]

    assert score(reward, requests(2)) == [0.0, 1.0]


def test_all_it_can_know_comes_by_name() -> None:
    got: dict[str, Any] = {}

    def reward(prompts: list[str], responses: list[str], **info: Any) -> list[float]:
        got.update(info, prompts=prompts)
        return [0.0] * len(prompts)

    turns = (("system", "be brief"), ("user", "hello"))
    score(reward, [RewardRequest(7, turns, "hi", False, "forum")])
    assert got == {
        "prompts": ["hello"],
        "messages": [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]],
        "finished": [False],
        "sources": ["forum"],
        "ids": [7],
    }


def test_a_function_gets_only_what_it_names() -> None:
    def reward(prompts: list[str], responses: list[str], finished: list[bool]) -> list[float]:
        return [1.0 if end else -1.0 for end in finished]

    assert score(reward, requests(2)) == [1.0, -1.0]


@pytest.mark.parametrize(
    "answer",
    [
        (0.5, 1),
        np.array([0.5, 1.0], dtype=np.float32),
        torch.tensor([0.5, 1.0], requires_grad=True),
        [np.float32(0.5), np.int64(1)],
        [Fraction(1, 2), 1],
    ],
    ids=["tuple", "array", "tensor", "numpy scalars", "other numbers"],
)
def test_numbers_come_in_many_kinds(answer: Any) -> None:
    found = score(lambda prompts, responses: answer, requests(2))
    assert found == [0.5, 1.0]
    assert all(type(value) is float for value in found)


def test_what_is_no_number_fails_its_own_response() -> None:
    answers = [1.5, None, float("nan"), "2", True, float("-inf"), 3e9, torch.tensor(1.0)]
    assert score(lambda prompts, responses: answers, requests(8), retries=2) == [
        1.5,
        Failure("function: the reward is missing"),
        Failure("function: the reward is NaN"),
        Failure("function: the reward is a str, no number"),
        Failure("function: the reward is a bool, no number"),
        Failure("function: the reward is infinite"),
        Failure("function: the reward is larger than 1e+09"),
        Failure("function: the reward is a Tensor, no number"),
    ]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([1.0], "gave 1 rewards for 2 responses"),
        ([1.0, 2.0, 3.0], "gave 3 rewards for 2 responses"),
        (None, "gave a NoneType, no list of rewards"),
        (1.0, "gave a float, no list of rewards"),
        ("ab", "gave a str, no list of rewards"),
        ({"a": 1.0, "b": 2.0}, "gave a dict, no list of rewards"),
        (np.float64(3.0), "gave a float64, no list of rewards"),
    ],
)
def test_another_answer_than_a_reward_each_fails_the_batch(answer: Any, reason: str) -> None:
    assert score(lambda prompts, responses: answer, requests(2)) == [Failure(f"function: {reason}")] * 2


def test_one_that_raises_once_is_called_again(capfd: pytest.CaptureFixture[str]) -> None:
    calls = []

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("the oracle sleeps\nand dreams")
        return by_number(prompts, responses)

    assert score(reward, requests(2), retries=1) == [0.0, 1.0]
    assert len(calls) == 2
    assert "the oracle sleeps" in capfd.readouterr().err  # the role's log has the traceback


def test_one_that_always_raises_is_the_reason_of_its_batch_alone() -> None:
    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        if "2" in responses:
            raise ValueError("no twos\nplease")
        return by_number(prompts, responses)

    reason = Failure("function: ValueError: no twos after 3 tries")
    assert score(reward, requests(6), batch=2, retries=2) == [0.0, 1.0, reason, reason, 4.0, 5.0]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), RecursionError()])
def test_no_error_of_a_function_ends_the_role(error: BaseException) -> None:
    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        raise error

    async def areward(prompts: list[str], responses: list[str]) -> list[float]:
        raise error

    for function in (reward, areward):
        (found,) = score(function, requests(1))
        assert isinstance(found, Failure)
        assert found.reason.startswith(f"function: {type(error).__name__}")


def test_a_call_that_hangs_is_a_failure_and_the_next_one_has_a_thread_of_its_own() -> None:
    calls, end = [], threading.Event()

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        calls.append(threading.current_thread())
        if len(calls) == 1:
            end.wait(30)
        return by_number(prompts, responses)

    start = time.monotonic()
    try:
        assert score(reward, requests(2), timeout_s=0.2, retries=1) == [0.0, 1.0]
        assert time.monotonic() - start < 5
        assert calls[0] is not calls[1]
    finally:
        end.set()


def test_an_async_call_that_hangs_is_cancelled_and_its_thread_used_again() -> None:
    heard, threads = [], []

    async def reward(prompts: list[str], responses: list[str]) -> list[float]:
        threads.append(threading.current_thread())
        if len(threads) == 1:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                heard.append(True)
                raise
        return by_number(prompts, responses)

    assert score(reward, requests(1), timeout_s=0.2) == [Failure("function: no answer within 0.2 s")]
    threads.clear()
    assert score(reward, requests(1), timeout_s=0.2, retries=1) == [0.0]
    assert heard == [True, True]
    assert threads[0] is threads[1]


def test_when_many_calls_hang_no_more_are_made() -> None:
    calls, end = [], threading.Event()

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        calls.append(1)
        end.wait(60)
        return []

    try:
        found = score(reward, requests(1), times=MOST_STUCK + 3, timeout_s=0.02)
        assert found == [Failure(f"function: {MOST_STUCK} earlier calls have not come back")]
        assert len(calls) == MOST_STUCK
    finally:
        end.set()


# ---- where it comes from


def test_a_function_is_found_in_a_file_and_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "judge_of_tests.py"
    file.write_text("def reward(prompts, responses):\n    return [2.0 for _ in responses]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_function(f"{file}:reward")([], ["a"]) == [2.0]
    assert load_function("judge_of_tests:reward")([], ["a"]) == [2.0]
    assert source_file(f"{file}:reward") == file
    assert source_file("judge_of_tests:reward") == file
    sys.modules.pop("judge_of_tests")


def test_its_file_is_found_without_running_it(tmp_path: Path) -> None:
    file = tmp_path / "loud.py"
    file.write_text("raise SystemExit('it was run')\n")
    assert source_file(f"{file}:reward") == file
    assert source_file("no_such_module_here:reward") is None


@pytest.mark.parametrize(
    ("code", "name", "said"),
    [
        ("def reward(prompts, responses): ...", "rewards", "has no such name: rewards"),
        ("reward = 3", "reward", "has a int, no function: reward"),
        ("import nothing_like_this", "reward", "cannot be imported: ModuleNotFoundError"),
        ("def broken(:", "broken", "cannot be imported: SyntaxError"),
        ("def reward(response): ...", "reward", "cannot be called as reward(prompts, responses)"),
        ("def reward(prompts, responses, model): ...", "reward", "missing a required argument: 'model'"),
    ],
)
def test_one_that_cannot_be_called_is_named_with_the_cure(tmp_path: Path, code: str, name: str, said: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(ConfigError) as caught:
        load_function(f"{file}:{name}")
    assert caught.value.message.startswith("ppo.reward.function: ")
    assert said in caught.value.message
    assert caught.value.hint


def test_a_missing_file_or_module_is_named() -> None:
    with pytest.raises(ConfigError, match=r"there is no file nowhere/mine\.py"):
        load_function("nowhere/mine.py:reward")
    with pytest.raises(ConfigError, match="no_such_module_here cannot be imported"):
        load_function("no_such_module_here:reward")


def test_a_secret_in_an_error_is_in_neither_the_reason_nor_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    """Reasons stand in the ledger and in reports."""

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        raise RuntimeError("401 for url: https://rewards.example/score?api_key=planted-Zq9vX0")

    (found,) = score(reward, requests(1))
    assert found == Failure("function: RuntimeError: 401 for url: https://rewards.example/score?api_key=***")
    written = capfd.readouterr().err
    assert "401 for url" in written
    assert "planted-Zq9vX0" not in written


class Hostile(Exception):
    """Whatever it is asked, it fails."""

    def __str__(self) -> str:
        raise ValueError("no words")


class NoNumber(Fraction):
    def __float__(self) -> float:
        raise ValueError("no number")


class NoList:
    def tolist(self) -> list[float]:
        raise ValueError("no list")


def test_an_error_that_cannot_be_told_and_an_answer_that_cannot_be_read_are_failures() -> None:
    def fails(prompts: list[str], responses: list[str]) -> list[float]:
        raise Hostile

    assert score(fails, requests(1)) == [Failure("function: Hostile")]
    for answer in ([NoNumber(1, 2)], NoList(), torch.empty(1, device="meta")):
        (found,) = score(lambda prompts, responses, answer=answer: answer, requests(1))
        assert isinstance(found, Failure)
        assert found.reason.startswith("function: its answer cannot be read: ")
