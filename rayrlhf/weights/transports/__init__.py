"""How the bytes of a bucket travel, a file per transport, chosen by `weights.transport`.

    sender (policy rank 0, or every rank)                    receiver (inside each vLLM worker)
    meet(meeting)           -- once, all at the same time -- meet(meeting)                 where `meets`
    reserve(nbytes) -> memory to pack into
    send(header) -> ticket  -- the driver relays it -->      receive(ticket) -> the bytes, good until it returns
    close()

A ticket is plain scalars. The sender may reuse the memory of bucket k for bucket k + 2: the driver asks for that
one only when every engine has taken bucket k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch

from rayrlhf.errors import ConfigError
from rayrlhf.weights.buckets import BucketHeader

__all__ = ["TRANSPORTS", "Meeting", "Receiver", "Sender", "Transport", "create_receiver", "create_sender"]

Ticket = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Transport:
    module: str
    """with `create_sender(run)` and `create_receiver()`"""
    meets: bool = False
    """sender and receivers form a group before the first bucket"""
    every_rank: bool = False
    """each rank of the policy sends to the workers near it; the tickets' `handles` are joined"""
    relayed: bool = False
    """engines on other nodes get a copy of each bucket through Ray's object store"""


TRANSPORTS = {
    "shared_memory": Transport("rayrlhf.weights.transports.shared_memory", relayed=True),
    "nccl": Transport("rayrlhf.weights.transports.nccl", meets=True),
    "ipc": Transport("rayrlhf.weights.transports.ipc", every_rank=True),
}


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where a group forms, and who one of it is; the sender is rank 0."""

    address: str
    port: int
    world_size: int
    rank: int


class Sender(Protocol):
    def meet(self, meeting: Meeting) -> None: ...
    def reserve(self, nbytes: int) -> torch.Tensor: ...
    def send(self, header: BucketHeader) -> Ticket: ...
    def close(self) -> None: ...


class Receiver(Protocol):
    def meet(self, meeting: Meeting) -> None: ...
    def receive(self, ticket: Ticket) -> torch.Tensor: ...
    def close(self) -> None: ...


def create_sender(transport: str, run: str) -> Sender:
    sender: Sender = _factory(transport, "create_sender")(run)
    return sender


def create_receiver(transport: str) -> Receiver:
    receiver: Receiver = _factory(transport, "create_receiver")()
    return receiver


def _factory(transport: str, name: str) -> Callable[..., Any]:
    if transport not in TRANSPORTS:
        raise ConfigError(f"weights.transport: no transport {transport!r}", f"one of {', '.join(sorted(TRANSPORTS))}")
    factory: Callable[..., Any] = getattr(import_module(TRANSPORTS[transport].module), name)
    return factory
