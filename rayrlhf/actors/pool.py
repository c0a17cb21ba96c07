"""The pool of rollout engines: it deals prompts to those whose weights are verified, and outlives any of them.

An engine that fails is replaced in the background. What it has not handed over goes to the others; where none is left,
or responses are bound to their engine, it waits for the new one, which gets the version that the others serve.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import Any

from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.publishing import EngineSide, PolicySide
from rayrlhf.actors.sharing import held_by
from rayrlhf.data.batching import balance
from rayrlhf.driver.protocols import RolloutBatch
from rayrlhf.errors import ActorError, PolicyMovedOn, WeightSyncError
from rayrlhf.metrics.throughput import later
from rayrlhf.types import PromptTokens, RolloutInfo, SampleRequest
from rayrlhf.weights.publish import Publication, WeightPublisher
from rayrlhf.weights.transports import TRANSPORTS

__all__ = ["EnginePool", "ExpectedTokens", "Replace"]

# A batch arrives in about so many parts: scoring starts early, and the driver is not asked too often.
PARTS = 8

Replace = Callable[[int, ActorError], Awaitable[None]]
"""Gives the engine of a rank a new process, which holds no weights yet; raises when it may not be replaced again."""
Shares = dict[EngineSide, list[SampleRequest]]


class EnginePool:
    """Samples from, and publishes to, all engines. Implements the driver's `RolloutPool` and `Weights`."""

    def __init__(
        self,
        engines: ActorGroup,
        policy: ActorGroup,
        publisher: WeightPublisher,
        prompts: Sequence[PromptTokens],
        fixed: bool = False,
        transport: str = "shared_memory",
        workers: int = 1,
        replace: Replace | None = None,
    ) -> None:
        """`workers`: of each engine. Without `replace` an engine that fails ends the batch.

        `fixed`: which engine draws a response, and with which others, depends on its number alone.
        """
        self._group = engines
        self._engines = [EngineSide(engines, rank) for rank in range(engines.ranks)]
        self._policy = PolicySide(policy, engines, TRANSPORTS[transport], workers)
        self._publisher = publisher
        self._fixed = fixed
        self._replace = replace
        self._lengths = ExpectedTokens({p.prompt_id: len(p.tokens) for p in prompts})
        self._serving: list[EngineSide] = []
        self._version: int | None = None
        self._published = asyncio.Event()
        # Responses and new weights take turns: a publish waits for the last response, and goes before the next batch.
        self._turn = asyncio.Lock()

    async def generate(
        self, requests: Sequence[SampleRequest], temperature: float | None = None
    ) -> AsyncGenerator[RolloutBatch]:
        """The responses, some at a time as they are finished, from the engines that hold verified weights.

        Raises:
            ActorError: engines failed, and may not be replaced any more.
        """
        if self._version is None:
            raise WeightSyncError("no engine holds verified weights", "publish before sampling")
        least, left, begun = len(requests) / (PARTS + 1), Shares(), 0.0
        while True:
            self._look_after_replacements()
            async with self._turn, held_by((self._group, "all")):
                now = perf_counter()
                begun = begun or now
                shares, left = self._shares(left, requests), Shares()
                async with aclosing(self._drawn(shares, temperature, least, left)) as parts:
                    async for part in parts:
                        yield dataclasses.replace(part, infos=later(part.infos, now - begun))
            if not left:
                return
            await self._engines_again()
            requests = [request for share in left.values() for request in share]

    async def _drawn(
        self, shares: Shares, temperature: float | None, least: float, left: Shares
    ) -> AsyncGenerator[RolloutBatch]:
        """What the engines hand over of their shares, at least so many at a time; what they do not is put in `left`."""
        arriving: asyncio.Queue[RolloutBatch | None] = asyncio.Queue()
        drawing = [
            asyncio.ensure_future(self._draw(engine, share, temperature, arriving, left))
            for engine, share in shares.items()
        ]
        everyone = asyncio.gather(*drawing)
        everyone.add_done_callback(lambda _: arriving.put_nowait(None))
        try:
            held, count = list[RolloutBatch](), 0
            while (part := await arriving.get()) is not None:
                self._lengths.learn(part.infos)
                held.append(part)
                count += len(part.infos)
                # If fixed, what is scored together must not depend on who was finished first. Shares are dealt by
                # tokens, not evenly: a little less than its part of the responses will do.
                if not self._fixed and count >= least:
                    yield RolloutBatch.joined(held)
                    held, count = [], 0
            await everyone
            if held:
                yield RolloutBatch.joined(held)
        finally:
            for engine_s in drawing:  # one by one: once one has failed, `everyone` is over and cancels nothing
                engine_s.cancel()
            # asyncio prints what nobody has looked at
            await asyncio.gather(everyone, *drawing, return_exceptions=True)

    async def _draw(
        self,
        engine: EngineSide,
        share: Sequence[SampleRequest],
        temperature: float | None,
        arriving: asyncio.Queue[RolloutBatch | None],
        left: Shares,
    ) -> None:
        if not share:
            return
        parts = 1 if self._fixed else -(-PARTS // len(self._serving))
        at_once, waiting = -(-len(share) // parts), {request.sample_id: request for request in share}

        async def ask(*call: Any) -> RolloutBatch:
            infos, handle = await self._group.call_rank(engine.rank, *call)
            return RolloutBatch(tuple(infos), (handle,))

        coming = deque([asyncio.ensure_future(ask("generate", engine.version, share, at_once, temperature))])
        try:
            for start in range(at_once, len(share) + at_once, at_once):
                # Asked for before the last one is here: an engine does not wait for the driver between two parts.
                if start < len(share):
                    coming.append(asyncio.ensure_future(ask("next_part")))
                part = await coming.popleft()
                arriving.put_nowait(part)
                for info in part.infos:
                    del waiting[info.sample_id]
        except (ActorError, WeightSyncError) as error:
            if self._replace is None:
                raise
            self._serving.remove(engine)
            left[engine] = list(waiting.values())
            if isinstance(error, ActorError):
                self._start_replacing(engine, error)
        finally:
            for part_s in coming:
                part_s.cancel()
            await asyncio.gather(*coming, return_exceptions=True)

    def _shares(self, left: Shares, requests: Sequence[SampleRequest]) -> Shares:
        """Who draws what: if fixed, what was left goes to the engine that had it."""
        if self._fixed and left and all(engine in self._serving for engine in left):
            return left
        return self._deal(requests)

    def _deal(self, requests: Sequence[SampleRequest]) -> Shares:
        """A share for each serving engine: of the requests by number, or of the tokens that they will likely take."""
        count = len(self._serving)
        if self._fixed:
            return {engine: list(requests[i::count]) for i, engine in enumerate(self._serving)}
        shares = balance([self._lengths.of(request.prompt_id) for request in requests], count)
        return {e: [requests[i] for i in share] for e, share in zip(self._serving, shares, strict=True)}

    async def publish(self, version: int) -> Publication:
        """Bring every engine, a quarantined one included, to `version`; only verified ones serve afterwards."""
        async with self._turn:
            self._serving = []
            while True:
                up = await self._some_engine()
                try:
                    result = await self._bring(version, up)
                except WeightSyncError:
                    if not (any(engine.replacing for engine in up) or self._coming()):
                        raise
                    continue  # all of them are lost: there will be others
                break
            self._version = version
            if self._fixed:
                await self._all_engines()
            self._published.set()
            return result

    @property
    def whole(self) -> bool:
        """No engine is being replaced."""
        return all(
            engine.replacing is None or (engine.replacing.done() and not engine.replacing.exception())
            for engine in self._engines
        )

    def policy_moved(self) -> None:
        """The policy's actors have been replaced."""
        self._policy.moved()

    async def close(self) -> None:
        """Nobody waits for engines that are being replaced any more."""
        replacing = [engine.replacing for engine in self._engines if engine.replacing]
        for future in replacing:
            future.cancel()
        await asyncio.gather(*replacing, return_exceptions=True)

    async def _bring(self, version: int, engines: Sequence[EngineSide], again: bool = False) -> Publication:
        """Publish to these engines; those that pass serve, those whose actors fail are replaced."""
        try:
            async with held_by((self._policy.group, "weights"), (self._group, "all")):
                result = await self._publisher.publish(version, self._policy.to(engines, again), engines)
        except WeightSyncError:
            self._policy.moved()
            raise
        finally:
            for engine in engines:
                if engine.lost and self._replace:
                    self._start_replacing(engine, engine.lost)
        if result.quarantined:
            self._policy.moved()
        passed = [engine for engine in engines if engine.name in result.committed]
        self._serving = sorted([*self._serving, *passed], key=lambda engine: engine.rank)
        return result

    async def _engines_again(self) -> None:
        """Wait until some engine serves; if fixed, until all that can do."""
        if self._fixed:
            async with self._turn:
                await self._all_engines()
        while not self._serving:
            await self._some_engine()
            async with self._turn:  # a publish that waits for its turn goes first, and may bring the engines back
                self._published.clear()
                same = bool(self._serving) or await self._late()
            if not same:  # the policy has learned meanwhile: its next version comes as soon as it is done
                await self._published.wait()

    async def _some_engine(self) -> list[EngineSide]:
        """Those that are not being replaced, once there is one."""
        while not (up := self._up()):
            await asyncio.wait(self._coming(), return_when=asyncio.FIRST_COMPLETED)
        return up

    async def _all_engines(self) -> None:
        """Bring back all that can be; one whose weights cannot be verified stays out."""
        same = True
        while same and len(self._serving) < len(self._engines):
            if coming := self._coming():
                await asyncio.wait(coming)
            same = await self._late()
            if not self._coming():
                return

    async def _late(self) -> bool:
        """Bring engines that have come back to the version that the others serve, if the policy still is that one."""
        late = [engine for engine in self._up() if engine not in self._serving]
        assert self._version is not None
        try:
            if late:
                await self._bring(self._version, late, again=True)
        except PolicyMovedOn:
            return False
        except WeightSyncError:
            if not any(engine.replacing for engine in late):
                raise
        return True

    def _up(self) -> list[EngineSide]:
        """Those that are not being replaced. One that may not be any more ends the run here when nobody else is left,
        else before the next samples: a step that others can take is published first, and so is saved."""
        self._look_after_replacements(bear=True)
        up = [engine for engine in self._engines if engine.replacing is None]
        if not up and not self._coming():
            self._look_after_replacements()
        return up

    def _coming(self) -> list[asyncio.Future[None]]:
        """Replacements under way, or done and not looked at yet."""
        every = [engine.replacing for engine in self._engines if engine.replacing is not None]
        return [future for future in every if not (future.done() and future.exception())]

    def _look_after_replacements(self, bear: bool = False) -> None:
        """Raises what ended one of them, unless it is to be borne."""
        for engine in self._engines:
            if engine.replacing is not None and engine.replacing.done():
                if bear and engine.replacing.exception():
                    continue
                engine.replacing.result()
                engine.replacing = engine.lost = None

    def _start_replacing(self, engine: EngineSide, error: ActorError) -> None:
        async def replaced(replace: Replace) -> None:
            await replace(engine.rank, error)
            self._policy.moved()

        assert self._replace is not None
        engine.lost = error
        engine.replacing = engine.replacing or asyncio.ensure_future(replaced(self._replace))


class ExpectedTokens:
    """How many tokens a response and its prompt will take: as many as the last response to that prompt did."""

    def __init__(self, prompts: Mapping[int, int]) -> None:
        """`prompts`: tokens of each prompt."""
        self._prompts = prompts
        self._last: dict[int, int] = {}
        self._seen, self._total = 0, 0

    def of(self, prompt_id: int) -> int:
        usual = self._total // self._seen if self._seen else 0
        return self._prompts.get(prompt_id, 0) + self._last.get(prompt_id, usual)

    def learn(self, infos: Sequence[RolloutInfo]) -> None:
        for info in infos:
            self._last[info.prompt_id] = info.response_tokens
            self._seen, self._total = self._seen + 1, self._total + info.response_tokens
