"""A policy and engines of two matrices, written by hand: real buckets and fingerprints, no process, no transport.

log-prob of token b after token a = log softmax(head @ embedding[a])[b]
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch

from rayrlhf.weights.buckets import BucketHeader, bucket_plan, fingerprint, pack, unpack
from rayrlhf.weights.publish import EngineReceipt

VOCAB, WIDTH = 50, 6
ROWS = [[1, 7, 30, 49], [0, 20, 40, 2]]


def logprobs(weights: dict[str, torch.Tensor], head: torch.Tensor, rows: list[list[int]]) -> list[float]:
    values = []
    for row in rows:
        table = torch.log_softmax(weights["embedding"][row[:-1]] @ head.T + weights["bias"], dim=-1)
        values += [float(table[i, token]) for i, token in enumerate(row[1:])]
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

    async def begin_publish(self, version: int) -> None:
        self._called("begin_publish")
        self._version, self._sent = version, list[str]()
        self._plan = bucket_plan([(n, t.nbytes) for n, t in self.weights.items()], self.bucket_bytes)

    async def next_bucket(self) -> dict[str, Any] | None:
        index = len(self._sent)
        self.log.append(("ask", index))
        self._called("next_bucket" if index == 0 else f"next_bucket {index}")
        for _ in range(3):
            await asyncio.sleep(0)
        if index == len(self._plan):
            return None
        tensors = [(name, self.weights[name]) for name in self._plan[index]]
        header, buffer = pack(tensors, self._version, index, lambda n: torch.zeros(n, dtype=torch.uint8))
        self._sent.append(fingerprint(header, buffer))
        return {"header": header.to_dict(), "bytes": buffer, "nbytes": header.nbytes}

    async def finish_publish(self) -> tuple[str, ...]:
        self._called("finish_publish")
        return tuple(self._sent)

    async def probe(self, rows: list[list[int]]) -> list[float]:
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
        self._kept: dict[int, dict[str, Any]] = {}

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.fault == f"raises in {name}":
            raise RuntimeError(f"{self.name} failed in {name}")

    async def begin_update(self, version: int) -> None:
        self._called("begin")
        self.version, self._pending = None, version
        self._got: list[str] = []
        self._loaded: set[str] = set()

    async def load_bucket(self, ticket: dict[str, Any]) -> None:
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

    async def finish_update(self) -> EngineReceipt:
        self._called("finish")
        if self.fault != "keeps a stale head":
            self.packed_head = self.weights["head"].clone()
        held = {*self.weights, *(["extra.bias"] if self.fault == "has a parameter nobody sends" else [])}
        return EngineReceipt(tuple(self._got), tuple(sorted(held - self._loaded)))

    async def probe(self, rows: list[list[int]]) -> list[float]:
        self._called("probe")
        values = logprobs(self.weights, self.packed_head, rows)
        return values[:-1] if self.fault == "answers a probe too short" else values

    async def commit(self, version: int) -> None:
        self._called("commit")
        self.version = version
