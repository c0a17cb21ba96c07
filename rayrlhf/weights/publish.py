"""One publish: policy -> every engine, bucket by bucket, verified before it counts.

    driver                      policy ranks                    engines (each)
      begin(version)      ->    plan the buckets         ->     begin(version): refuses to generate from here on
      next_bucket()       ->    gather shards, pack      ->     load(ticket): copy, fingerprint, re-pack     } per
      ... the next bucket is gathered while the engines load this one ...                                    } bucket
      finish()            ->    fingerprints sent               finish(): fingerprints got, parameters covered
      probe(rows)         ->    log-probs                       log-probs (after its caches are dropped)
      commit(version)                                     ->    serves again, as this version

An engine that fails any of it stays uncommitted (quarantined): it generates nothing until a later publish reaches it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

from rayrlhf.errors import WeightSyncError
from rayrlhf.weights.probe import gap_error

__all__ = ["EngineReceipt", "Publication", "PublishSource", "PublishTarget", "WeightPublisher"]


@dataclass(frozen=True, slots=True)
class EngineReceipt:
    """What one engine says it got."""

    fingerprints: tuple[str, ...]
    missing: tuple[str, ...]
    """Parameters the engine holds that no bucket reached."""


class PublishSource(Protocol):
    """The policy's learner group."""

    async def begin_publish(self, version: int) -> None: ...
    async def next_bucket(self) -> dict[str, Any] | None: ...
    async def finish_publish(self) -> tuple[str, ...]: ...
    async def probe(self, rows: list[list[int]]) -> list[float]: ...


class PublishTarget(Protocol):
    """One rollout engine."""

    name: str

    async def begin_update(self, version: int) -> None: ...
    async def load_bucket(self, ticket: dict[str, Any]) -> None: ...
    async def finish_update(self) -> EngineReceipt: ...
    async def probe(self, rows: list[list[int]]) -> list[float]: ...
    async def commit(self, version: int) -> None: ...


@dataclass(slots=True)
class Publication:
    """The outcome of a publish."""

    version: int
    buckets: int = 0
    seconds: float = 0.0
    transfer_s: float = 0.0
    probe_s: float = 0.0
    nbytes: int = 0
    fingerprints: tuple[str, ...] = ()
    committed: list[str] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    """engine name -> why it did not commit"""


class WeightPublisher:
    """Publishes the policy to the engines and commits a version only where it was verified."""

    def __init__(self, rows: list[list[int]], dtype: str, tolerance: float | None) -> None:
        self._rows = rows
        self._dtype = dtype
        self._tolerance = tolerance

    async def publish(self, version: int, source: PublishSource, targets: Sequence[PublishTarget]) -> Publication:
        """Raises WeightSyncError when no engine could be verified."""
        start = perf_counter()
        result = Publication(version)
        alive = await self._each(result, targets, lambda t: t.begin_update(version))
        alive = await self._send_buckets(result, source, alive)
        result.transfer_s = perf_counter() - start
        alive = await self._compare_fingerprints(result, source, alive)
        alive = await self._probe(result, source, alive)
        committed = await self._each(result, alive, lambda t: t.commit(version))
        result.committed = [t.name for t in committed]
        result.seconds = perf_counter() - start
        if not committed:
            why = "; ".join(f"{name}: {reason}" for name, reason in result.quarantined.items())
            raise WeightSyncError(
                f"weights version {version}: no engine could be verified ({why})",
                "the run stops rather than sample from unknown weights; see logs/ of the engines named",
            )
        return result

    async def _send_buckets(
        self, result: Publication, source: PublishSource, alive: list[PublishTarget]
    ) -> list[PublishTarget]:
        await source.begin_publish(result.version)
        ticket = await source.next_bucket()
        while ticket is not None:
            result.buckets += 1
            result.nbytes += ticket["nbytes"]
            current = ticket
            loading = asyncio.ensure_future(self._each(result, alive, lambda t, c=current: t.load_bucket(c)))
            try:
                ticket = await source.next_bucket()
            finally:
                alive = await loading
        return alive

    async def _compare_fingerprints(
        self, result: Publication, source: PublishSource, alive: list[PublishTarget]
    ) -> list[PublishTarget]:
        result.fingerprints = await source.finish_publish()

        async def check(target: PublishTarget) -> None:
            receipt = await target.finish_update()
            if receipt.missing:
                raise WeightSyncError(f"no weights came for {', '.join(receipt.missing[:3])}")
            if receipt.fingerprints != result.fingerprints:
                raise WeightSyncError(_first_difference(result.fingerprints, receipt.fingerprints))

        return await self._each(result, alive, check)

    async def _probe(
        self, result: Publication, source: PublishSource, alive: list[PublishTarget]
    ) -> list[PublishTarget]:
        start = perf_counter()
        expected = await source.probe(self._rows)

        async def check(target: PublishTarget) -> None:
            error = gap_error(expected, await target.probe(self._rows), self._dtype, self._tolerance)
            if error:
                raise WeightSyncError(error)

        passed = await self._each(result, alive, check)
        result.probe_s = perf_counter() - start
        return passed

    async def _each(self, result: Publication, targets: Sequence[PublishTarget], call: Any) -> list[PublishTarget]:
        """Run `call` on all targets at once; those that raise are quarantined, the others returned."""
        outcomes = await asyncio.gather(*(call(t) for t in targets), return_exceptions=True)
        passed = []
        for target, outcome in zip(targets, outcomes, strict=True):
            if isinstance(outcome, Exception):
                result.quarantined[target.name] = str(outcome) or repr(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                passed.append(target)
        return passed


def _first_difference(sent: tuple[str, ...], got: tuple[str, ...]) -> str:
    if len(sent) != len(got):
        return f"{len(sent)} buckets were sent, {len(got)} arrived"
    index = next(i for i, (a, b) in enumerate(zip(sent, got, strict=True)) if a != b)
    return f"bucket {index} of {len(sent)} arrived altered (sent {sent[index]}, got {got[index]})"
