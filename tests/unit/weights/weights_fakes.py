"""A policy and engines of two matrices, written by hand: real buckets and fingerprints, no process, no transport.

log-prob of token b after token a = log softmax(head @ embedding[a])[b]
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch

from rayrlhf.weights.buckets import BucketHeader, bucket_plan, fingerprint, pack, unpack
from rayrlhf.weights.probe import ProbeRow
from rayrlhf.weights.publish import EngineReceipt, SentBucket

VOCAB, WIDTH = 50, 6
ROWS = [ProbeRow([30, 1], [7, 30, 49]), ProbeRow([40, 0], [20, 40, 2])]


def logprobs(weights: dict[str, torch.Tensor], head: torch.Tensor, rows: list[ProbeRow]) -> list[float]:
    values = []
    for row in rows:
        table = torch.log_softmax(weights["embedding"][row.context[-1]] @ head.T + weights["bias"], dim=-1)
        values += [float(table[token]) for token in row.targets]
    return values


class Policy:
    """A `PublishSource`. `log` hears of each bucket asked for; a name in `fail` makes that call raise."""

    def __init__(self, bucket_bytes: int = 1400, log: list[Any] | None = None) -> None:
        torch.manual_seed(1)
        self.weights = {
            "embedding": torch.randn(VOCAB, WIDTH),
            "head": torch.randn(VOCAB, WIDTH),
            "bias": torch.randn(VOCAB),
        }
        self.bucket_bytes = bucket_bytes
        self.log = [] if log is None else log
        self.fail = ""
        self.calls: list[str] = []

    def learn(self) -> None:
        for tensor in self.weights.values():
            tensor += 0.5 * torch.randn_like(tensor)

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.fail == name:
            raise RuntimeError(f"policy failed in {name}")

    async def start_publish(self, version: int) -> SentBucket:
        self._called("start_publish")
        self._version, self._sent = version, 0
        self._plan = bucket_plan([(n, t.nbytes) for n, t in self.weights.items()], self.bucket_bytes)
        return await self.next_bucket()

    async def next_bucket(self) -> SentBucket:
        index = self._sent
        self.log.append(("ask", index))
        self._called(f"next_bucket {index}")
        for _ in range(3):
            await asyncio.sleep(0)
        self._sent += 1
        tensors = [(name, self.weights[name]) for name in self._plan[index]]
        header, buffer = pack(tensors, self._version, index, lambda n: torch.zeros(n, dtype=torch.uint8))
        ticket = {"header": header.to_dict(), "bytes": buffer}
        last = self._sent == len(self._plan)
        return SentBucket(ticket, fingerprint(header, buffer), header.nbytes, last, 0.25, 0.5)

    async def probe(self, rows: list[ProbeRow]) -> list[float]:
        self._called("probe")
        return logprobs(self.weights, self.weights["head"], rows)


class Engine:
    """A `PublishTarget` that keeps a packed copy of its head, as vLLM does. `fault` is what goes wrong with it."""

    def __init__(self, name: str, log: list[Any] | None = None, load_turns: int = 0) -> None:
        self.name = name
        self.fault = ""
        self.version: int | None = None
        self.log = [] if log is None else log
        self.calls: list[str] = []
        self.weights = {
            "embedding": torch.zeros(VOCAB, WIDTH),
            "head": torch.zeros(VOCAB, WIDTH),
            "bias": torch.zeros(VOCAB),
        }
        self.packed_head = torch.zeros(VOCAB, WIDTH)
        self._load_turns = load_turns
        self._turn = asyncio.Lock()  # an actor takes its calls one by one, in order
        self._kept: dict[int, dict[str, Any]] = {}

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.fault == f"raises in {name}":
            raise RuntimeError(f"{self.name} failed in {name}")

    async def begin_update(self, version: int) -> None:
        async with self._turn:
            self._called("begin")
            self.version, self._got, self._loaded = None, list[str](), set[str]()

    async def load_bucket(self, ticket: dict[str, Any]) -> None:
        async with self._turn:
            await self._load(ticket)

    async def _load(self, ticket: dict[str, Any]) -> None:
        index = ticket["header"]["index"]
        self.log.append(("start", index))
        self._called("load")
        if self.fault == "drops a bucket" and index == 1:
            return
        previous, self._kept[index] = self._kept.get(index), ticket
        if self.fault == "gets a bucket of the previous version" and index == 1 and previous:
            ticket = previous
        header, buffer = BucketHeader.from_dict(ticket["header"]), ticket["bytes"].clone()
        if self.fault == "gets a flipped bit" and index == 1:
            buffer[5] ^= 1
        self._got.append(fingerprint(header, buffer))
        for name, tensor in unpack(header, buffer):
            self.weights[name].copy_(tensor)
            self._loaded.add(name)
        for _ in range(self._load_turns):
            await asyncio.sleep(0)
        self.log.append(("end", index))

    async def verify(self, ticket: dict[str, Any], rows: list[ProbeRow]) -> EngineReceipt:
        async with self._turn:
            await self._load(ticket)
            self._called("verify")
            if self.fault != "keeps a stale head":
                self.packed_head = self.weights["head"].clone()
            held = {*self.weights, *(["extra.bias"] if self.fault == "has a parameter nobody sends" else [])}
            values = logprobs(self.weights, self.packed_head, rows)
            if self.fault == "answers a probe too short":
                values = values[:-1]
            missing = tuple(sorted(held - self._loaded))
            return EngineReceipt(tuple(self._got), missing, tuple(values), 1.0, 2.0, 3.0, 4.0)

    async def commit(self, version: int) -> None:
        self._called("commit")
        self.version = version
