"""One publish: policy -> every engine, bucket by bucket, verified before it counts.

    driver                      policy ranks                    engines (each)
      begin(version)         -> plan the buckets         ->     begin(version): samples nothing from here on
      next_bucket()          -> gather shards, pack      ->     load(ticket): copy, fingerprint, re-pack    } per
                             -> ... the next one, while the engines load the one before ...                 } bucket
      probe(rows)            -> log-probs                       verify(rows): fingerprints got, parameters covered,
                                                                caches dropped, log-probs
      commit(version)                                    ->     serves again, as this version

An engine that fails any of it stays uncommitted (quarantined) until a later publish reaches it. Calls are sent ahead,
not waited for one by one: an engine finds its next bucket in its queue. The last bucket comes with the call to verify,
and a commit may come with the next request to sample.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

from rayrlhf.errors import WeightSyncError
from rayrlhf.weights.probe import ProbeRow, gap_error

__all__ = [
    "PUBLISH_PARTS",
    "EngineReceipt",
    "Publication",
    "PublishSource",
    "PublishTarget",
    "SentBucket",
    "WeightPublisher",
]

# What a `Publication` has seconds of, as `<part>_s`.
PUBLISH_PARTS = ("gather", "transfer", "fingerprint", "load", "probe")
# Buckets between sender and engines: one being packed, one being loaded.
IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class SentBucket:
    """What the sender says of a bucket that is ready."""

    ticket: dict[str, Any]
    """for the engines: header, and where the bytes are"""
    fingerprint: str
    nbytes: int
    last: bool
    gather_s: float = 0.0
    """gathering shards and packing them"""
    fingerprint_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineReceipt:
    """What one engine says it got."""

    fingerprints: tuple[str, ...]
    missing: tuple[str, ...]
    """Parameters the engine holds that no bucket reached."""
    logprobs: tuple[float, ...]
    """of the probe's targets, row after row"""
    transfer_s: float = 0.0
    """copying the bytes"""
    fingerprint_s: float = 0.0
    load_s: float = 0.0
    """into the engine's own layout"""
    probe_s: float = 0.0
    memory_gib: float = 0.0
    """that the engine holds afterwards"""


class PublishSource(Protocol):
    """The policy's learner group."""

    async def start_publish(self, version: int) -> SentBucket: ...
    async def next_bucket(self) -> SentBucket: ...
    async def probe(self, rows: Sequence[ProbeRow]) -> list[float]: ...


class PublishTarget(Protocol):
    """One rollout engine. It takes its calls in the order in which they were made."""

    name: str

    async def begin_update(self, version: int) -> None: ...
    async def load_bucket(self, ticket: dict[str, Any]) -> None: ...
    async def verify(self, ticket: dict[str, Any], rows: Sequence[ProbeRow]) -> EngineReceipt:
        """Load the last bucket, and say what came."""
        ...

    async def commit(self, version: int) -> None: ...


@dataclass(slots=True)
class Publication:
    """The outcome of a publish. What engines do at the same time counts as long as the slowest takes."""

    version: int
    buckets: int = 0
    seconds: float = 0.0
    nbytes: int = 0
    gather_s: float = 0.0
    """gathering shards and packing them, on the policy's side"""
    transfer_s: float = 0.0
    """copying the bytes, on the engine's side"""
    fingerprint_s: float = 0.0
    """on both sides"""
    load_s: float = 0.0
    """into the engine's own layout"""
    probe_s: float = 0.0
    """on the engine's side; the policy's runs beside the load"""
    memory_gib: float = 0.0
    """of the largest engine"""
    fingerprints: tuple[str, ...] = ()
    committed: list[str] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    """engine name -> why it did not commit"""

    def sent(self, bucket: SentBucket) -> None:
        self.buckets += 1
        self.nbytes += bucket.nbytes
        self.gather_s += bucket.gather_s
        self.fingerprint_s += bucket.fingerprint_s
        self.fingerprints += (bucket.fingerprint,)

    def received(self, receipts: Sequence[EngineReceipt]) -> None:
        for name in ("transfer_s", "load_s", "probe_s", "fingerprint_s", "memory_gib"):
            slowest = max((getattr(r, name) for r in receipts), default=0.0)
            setattr(self, name, getattr(self, name) + slowest)


class WeightPublisher:
    """Publishes the policy to the engines and commits a version only where it was verified."""

    def __init__(self, rows: Sequence[ProbeRow], dtype: str, tolerance: float | None) -> None:
        self._rows = rows
        self._dtype = dtype
        self._tolerance = tolerance

    async def publish(self, version: int, source: PublishSource, targets: Sequence[PublishTarget]) -> Publication:
        """Raises WeightSyncError when no engine could be verified."""
        start = perf_counter()
        result = Publication(version)
        alive, loading, last = await self._send_buckets(result, source, targets)
        # Sent before the bucket ahead of it is loaded: each engine goes on by itself, and the policy probes meanwhile.
        checking = self._each(result, alive, lambda t: t.verify(last, self._rows))
        try:
            expected = await asyncio.ensure_future(source.probe(self._rows))
        finally:
            await asyncio.gather(*loading)
            receipts = await checking
        verified = await self._compare(result, receipts, expected)
        committed = await self._each(result, verified, lambda t: t.commit(version))
        result.committed = [t.name for t, _ in committed]
        result.seconds = perf_counter() - start
        if not committed:
            why = "; ".join(f"{name}: {reason}" for name, reason in result.quarantined.items())
            raise WeightSyncError(
                f"weights version {version}: no engine could be verified ({why})",
                "the run stops rather than sample from unknown weights; see logs/ of the engines named",
            )
        return result

    async def _send_buckets(
        self, result: Publication, source: PublishSource, targets: Sequence[PublishTarget]
    ) -> tuple[list[PublishTarget], deque[asyncio.Future[Any]], dict[str, Any]]:
        """All but the last: the engines that have failed nothing so far, loads still under way, the last's ticket."""
        alive, loading = list(targets), deque[asyncio.Future[Any]]()
        opening = self._each(result, targets, lambda t: t.begin_update(result.version))
        try:
            bucket = await source.start_publish(result.version)
            alive = [t for t, _ in await opening]
            while True:
                result.sent(bucket)
                ticket = bucket.ticket
                if bucket.last:
                    return alive, loading, ticket
                loading.append(self._each(result, alive, lambda t, k=ticket: t.load_bucket(k)))
                if len(loading) == IN_FLIGHT:  # the next bucket takes the memory of the oldest
                    loaded = [t for t, _ in await loading.popleft()]
                    alive = [t for t in alive if t in loaded]
                bucket = await source.next_bucket()
        except BaseException:
            await asyncio.gather(opening, *loading)
            raise

    async def _compare(
        self, result: Publication, receipts: list[tuple[PublishTarget, EngineReceipt]], expected: Sequence[float]
    ) -> list[PublishTarget]:
        result.received([receipt for _, receipt in receipts])
        verified = []
        for target, receipt in receipts:
            error = gap_error(expected, receipt.logprobs, self._dtype, self._tolerance)
            if receipt.missing:
                error = f"no weights came for {', '.join(receipt.missing[:3])}"
            elif receipt.fingerprints != result.fingerprints:
                error = _first_difference(result.fingerprints, receipt.fingerprints)
            if error:
                result.quarantined.setdefault(target.name, error)
            elif target.name not in result.quarantined:
                verified.append(target)
        return verified

    def _each(
        self, result: Publication, targets: Sequence[PublishTarget], call: Any
    ) -> asyncio.Future[list[tuple[PublishTarget, Any]]]:
        """Run `call` on all targets at once, from now on: before any call that is made later.

        Those that raise are quarantined, the others returned with the answer.
        """
        calls = asyncio.gather(*(call(t) for t in targets), return_exceptions=True)
        return asyncio.ensure_future(self._passed(result, targets, calls))

    async def _passed(
        self, result: Publication, targets: Sequence[PublishTarget], calls: asyncio.Future[list[Any]]
    ) -> list[tuple[PublishTarget, Any]]:
        outcomes, passed = await calls, []
        for target, outcome in zip(targets, outcomes, strict=True):
            if isinstance(outcome, Exception):
                # What follows the first failure follows from it.
                result.quarantined.setdefault(target.name, str(outcome) or repr(outcome))
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                passed.append((target, outcome))
        return passed


def _first_difference(sent: tuple[str, ...], got: tuple[str, ...]) -> str:
    if len(sent) != len(got):
        return f"{len(sent)} buckets were sent, {len(got)} arrived"
    index = next(i for i, (a, b) in enumerate(zip(sent, got, strict=True)) if a != b)
    return f"bucket {index} of {len(sent)} arrived altered (sent {sent[index]}, got {got[index]})"
