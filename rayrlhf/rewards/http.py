"""A reward source that is a service: JSON over HTTP, in batches.

    POST {"samples": [{"id", "prompt", "messages", "response", "finished", "source"}, ...]}
      -> {"rewards": [number or null, ...]}                                              as many, in the same order

Nothing that a service does can stop a run or get past its limits: every call has a time and a size limit, redirects are
not followed, and whatever is not an answer in this form is a failure with its reason. A reason never quotes what the
service sent: it may be enormous, or the token come back.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from rayrlhf.config.rewards import LOOPBACK, RewardSourceConfig
from rayrlhf.rewards.base import Failure, Outcome, RewardRequest, outcome
from rayrlhf.rewards.breaker import CircuitBreaker
from rayrlhf.rewards.retry import Retries, Trouble

__all__ = ["HTTPSource", "retry_after_s"]


class HTTPSource:
    def __init__(
        self,
        config: RewardSourceConfig,
        token: str | None,
        retries: Retries,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert config.url is not None
        self._url = config.url
        self._config = config
        self._retries = retries
        self._breaker = CircuitBreaker(config.breaker_failures, config.breaker_pause_s, clock)
        self._last = ""
        """why a call failed last"""
        # Unpacked, a small answer may be enormous.
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=None,  # of each single read; `_call` limits the whole
            follow_redirects=False,
            limits=httpx.Limits(max_connections=config.concurrency),
            trust_env=urlsplit(self._url).hostname not in LOOPBACK,  # a proxy elsewhere does not reach this machine
        )

    async def score(self, requests: Sequence[RewardRequest]) -> list[Outcome]:
        free = asyncio.Semaphore(self._config.concurrency)

        async def score(batch: Sequence[RewardRequest]) -> list[Outcome]:
            async with free:
                return await self._score(batch)

        size = self._config.batch
        parts = await asyncio.gather(*(score(requests[i : i + size]) for i in range(0, len(requests), size)))
        return [found for part in parts for found in part]

    async def close(self) -> None:
        await self._client.aclose()

    async def _score(self, batch: Sequence[RewardRequest]) -> list[Outcome]:
        body = json.dumps({"samples": [_sample(request) for request in batch]}).encode()
        try:
            return await self._retries.run(lambda: self._guarded(body, len(batch)))
        except Trouble as trouble:
            return [Failure(f"http: {trouble.reason}")] * len(batch)

    async def _guarded(self, body: bytes, count: int) -> list[Outcome]:
        """A call, unless the breaker is open."""
        ticket = self._breaker.admit()
        if ticket is None:
            wait = min(self._breaker.wait_s(), self._config.max_wait_s)
            raise Trouble(f"{self._last} (circuit open)", wait_s=wait)
        well = False
        try:
            found = await self._call(body, count)
            well = True
        except Trouble as trouble:
            # A service that refuses what it is asked, or asks for time, is there.
            well = isinstance(trouble, _Refusal)
            self._last = self._last if well else trouble.reason
            raise
        finally:  # also when it is cancelled
            (self._breaker.succeeded if well else self._breaker.failed)(ticket)
        return found

    async def _call(self, body: bytes, count: int) -> list[Outcome]:
        try:
            async with asyncio.timeout(self._config.timeout_s):
                answer = await self._post(body)
        except TimeoutError:
            raise Trouble(f"no answer within {self._config.timeout_s:g} s") from None
        except Trouble:
            raise
        except Exception as error:  # idna's too, of a redirect's host; its text may hold what was sent
            raise Trouble(type(error).__name__) from None
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):  # not UTF-8, not JSON, an endless number, or nested without end
            raise Trouble("the answer is not JSON") from None
        rewards = found.get("rewards") if isinstance(found, dict) else None
        if not isinstance(rewards, list):
            raise Trouble('the answer is not {"rewards": [...]}')
        if len(rewards) != count:
            raise Trouble(f"{len(rewards)} rewards for {count} responses")
        return [outcome(reward, "http: the reward") for reward in rewards]

    async def _post(self, body: bytes) -> bytes:
        """The answer's body.

        Raises:
            Trouble: it is not a 2xx, or longer than allowed; no more of it is read then.
        """
        limit = int(self._config.max_response_mib * 2**20)
        headers, answer = {"Content-Type": "application/json"}, bytearray()
        async with self._client.stream("POST", self._url, content=body, headers=headers) as response:
            _check_status(response.status_code, response.headers)
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > limit:
                    raise Trouble(f"the answer is longer than {self._config.max_response_mib:g} MiB")
        return bytes(answer)


class _Refusal(Trouble):
    """The service is well and will not do it, or not now."""


def _check_status(status: int, headers: Mapping[str, str]) -> None:
    if 200 <= status < 300:
        if headers.get("content-encoding", "identity") != "identity":
            raise Trouble("the answer is compressed, which was not asked for")
        return
    wait = retry_after_s(headers.get("retry-after"))
    if status == 429:
        raise _Refusal("429", wait_s=wait)
    if status >= 500:
        raise Trouble(str(status), wait_s=wait)
    if 300 <= status < 400:
        raise _Refusal(f"{status}, a redirect, which is not followed", again=False)
    raise _Refusal(str(status), again=False)


def retry_after_s(value: str | None, now: datetime | None = None) -> float:
    """Seconds that a Retry-After header asks for, in either form (RFC 9110, section 10.2.3); 0 for any other value."""
    if value is None:
        return 0.0
    if value.strip().isascii() and value.strip().isdigit():
        return min(float(value), 1e9)
    try:
        until = email.utils.parsedate_to_datetime(value)
        return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())
    except (TypeError, ValueError, OverflowError):  # no date, or one without a time zone
        return 0.0


def _sample(request: RewardRequest) -> dict[str, Any]:
    return {
        "id": request.sample_id,
        "prompt": request.prompt[-1][1],
        "messages": [{"role": role, "content": text} for role, text in request.prompt],
        "response": request.response,
        "finished": request.finished,
        "source": request.source,
    }
