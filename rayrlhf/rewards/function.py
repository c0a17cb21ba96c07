"""A reward source that is a user's Python function, called on batches in a thread of its own.

    def reward(prompts: list[str], responses: list[str], **info) -> list[float | None]

It may be `async`. Of `info` it gets what it names, all with `**`: see INFO.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from rayrlhf.config.modules import import_named
from rayrlhf.config.rewards import RewardSourceConfig
from rayrlhf.config.secrets import masked
from rayrlhf.errors import ConfigError
from rayrlhf.rewards.base import Failure, Outcome, RewardRequest, outcome
from rayrlhf.rewards.retry import Retries, Trouble

__all__ = ["INFO", "FunctionSource", "load_function", "source_file"]

KEY = "ppo.reward.function"
# What a function can ask for by name beside prompts and responses, a value for each response.
INFO: dict[str, Callable[[RewardRequest], Any]] = {
    "messages": lambda request: [{"role": role, "content": text} for role, text in request.prompt],
    "finished": lambda request: request.finished,
    "sources": lambda request: request.source,
    "ids": lambda request: request.sample_id,
}
_Ended = tuple[Any, BaseException | None]
# A thread cannot be ended. When so many calls have not come back, no more are made.
MOST_STUCK = 8
# One that was cancelled has so long to notice.
HEED_S = 0.2


class FunctionSource:
    def __init__(self, function: Callable[..., Any], config: RewardSourceConfig, retries: Retries) -> None:
        self._function = function
        self._config = config
        self._retries = retries
        self._asked = _asked_for(function)
        self._thread = _Thread()
        self._stuck: list[_Thread] = []

    async def score(self, requests: Sequence[RewardRequest]) -> list[Outcome]:
        size, found = self._config.batch, list[Outcome]()
        for start in range(0, len(requests), size):
            found += await self._score(requests[start : start + size])
        return found

    async def close(self) -> None:
        self._thread.stop()

    async def _score(self, batch: Sequence[RewardRequest]) -> list[Outcome]:
        try:
            return await self._retries.run(lambda: self._call(batch))
        except Trouble as trouble:
            return [Failure(f"function: {trouble.reason}")] * len(batch)

    async def _call(self, batch: Sequence[RewardRequest]) -> list[Outcome]:
        prompts, responses = [r.prompt[-1][1] for r in batch], [r.response for r in batch]
        info = {name: [INFO[name](request) for request in batch] for name in self._asked}
        answer = await self._within(partial(self._function, prompts, responses, **info), self._config.timeout_s)
        try:
            return _outcomes(answer, len(batch))
        except Trouble:
            raise
        except Exception as error:  # the answer is somebody's own object: anything may go wrong in it
            raise Trouble(f"its answer cannot be read: {type(error).__name__}") from None

    async def _within(self, call: Callable[[], Any], limit_s: float) -> Any:
        """Raises Trouble when it fails or takes longer; a thread that does not come back is left to itself."""
        self._stuck = [thread for thread in self._stuck if thread.is_alive()]
        if len(self._stuck) >= MOST_STUCK:
            raise Trouble(f"{MOST_STUCK} earlier calls have not come back", again=False)
        running = self._thread.submit(call)
        if not (await asyncio.wait([running], timeout=limit_s))[0]:
            self._thread.cancel()
            if not (await asyncio.wait([running], timeout=HEED_S))[0]:
                self._thread.stop()  # once it comes back
                self._stuck.append(self._thread)
                self._thread = _Thread()
            raise Trouble(f"no answer within {limit_s:g} s")
        answer, error = running.result()
        if error is not None:
            raise Trouble(f"{type(error).__name__}: {said}" if (said := _said(error)) else type(error).__name__)
        return answer


class _Thread:
    """Makes one call after the other. A daemon: the end of the process does not wait for it."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[_Ended]] | None] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._awaited: asyncio.Future[Any] | None = None
        self._thread = threading.Thread(target=self._work, name="reward-function", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any]) -> asyncio.Future[_Ended]:
        """How the call will have ended; an async one's result is waited for."""
        ended: Future[_Ended] = Future()
        self._calls.put((call, ended))
        return asyncio.wrap_future(ended)

    def cancel(self) -> None:
        """Tell an async call to end; any other does not hear."""
        if (awaited := self._awaited) is not None:
            self._loop.call_soon_threadsafe(awaited.cancel)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._calls.put(None)

    def _work(self) -> None:
        while (job := self._calls.get()) is not None:
            call, ended = job
            try:
                answer = call()  # with no loop running: a function may start one of its own
                if inspect.isawaitable(answer):
                    self._awaited = asyncio.ensure_future(answer, loop=self._loop)
                    answer = self._loop.run_until_complete(self._awaited)
                ended.set_result((answer, None))
            except BaseException as error:  # somebody's own code: sys.exit() must not end the role
                sys.stderr.write(masked(traceback.format_exc()))  # to the role's log
                ended.set_result((None, error))
            self._awaited = None
        self._loop.close()


def load_function(place: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:name` or `module:name` names.

    Raises:
        ConfigError: there is no such file, module or function, it cannot be imported, or it cannot be called with
            (prompts, responses).
    """
    where, _, name = place.rpartition(":")
    module = import_named(where, KEY, "reward", "write path/to/file.py:name")
    function = getattr(module, name, None)
    if not callable(function):
        what = "no such name" if function is None else f"a {type(function).__name__}, no function"
        raise ConfigError(f"{KEY}: {where} has {what}: {name}", "name a function in it")
    try:
        inspect.signature(function).bind([], [], **{name: [] for name in _asked_for(function)})
    except TypeError as error:
        raise ConfigError(
            f"{KEY}: {place} cannot be called as {name}(prompts, responses): {error}",
            f"give it those two arguments; it may name {', '.join(INFO)} too, or take **info",
        ) from None
    except ValueError:
        pass  # a builtin without a signature
    return function  # type: ignore[no-any-return]


def source_file(place: str) -> Path | None:
    """The file that the function is in, without running it; None if there is none."""
    where = place.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(where) if Path(where).is_file() else None
    try:
        spec = importlib.util.find_spec(where)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def _asked_for(function: Callable[..., Any]) -> list[str]:
    """Which of INFO the function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return list(INFO)
    named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return [name for name in INFO if name in named]


def _outcomes(answer: Any, count: int) -> list[Outcome]:
    """Of a list, a tuple, an array or a tensor of rewards.

    Raises:
        Trouble: it is something else, or not as many.
    """
    rewards = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(rewards, list | tuple):
        raise Trouble(f"gave a {type(answer).__name__}, no list of rewards")
    if len(rewards) != count:
        raise Trouble(f"gave {len(rewards)} rewards for {count} responses")
    return [outcome(reward, "function: the reward") for reward in rewards]


def _said(error: BaseException) -> str:
    """The first line of its message: a URL in it may hold a key, and reasons are written to records."""
    try:
        return masked(str(error)).strip().partition("\n")[0][:200]
    except Exception:  # its own __str__ fails
        return ""
