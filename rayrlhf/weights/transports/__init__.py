"""How the bytes of a bucket travel, a file per transport, chosen by `weights.transport`.

    sender (policy rank 0)                                   receiver (inside each vLLM worker)
    reserve(nbytes) -> memory to pack into
    send(header) -> ticket  -- the driver relays it -->      receive(ticket) -> the bytes, a copy of its own
    close()

A ticket is plain scalars. The sender may reuse the memory of bucket k for bucket k + 2: the driver asks for that
one only when every engine has taken bucket k.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch

from rayrlhf.errors import ConfigError
from rayrlhf.weights.buckets import BucketHeader

__all__ = ["TRANSPORTS", "Receiver", "Sender", "create_receiver", "create_sender"]

Ticket = dict[str, Any]

# name -> module with `create_sender(run)` and `create_receiver()`
TRANSPORTS = {"shared_memory": "rayrlhf.weights.transports.shared_memory"}


class Sender(Protocol):
    def reserve(self, nbytes: int) -> torch.Tensor: ...
    def send(self, header: BucketHeader) -> Ticket: ...
    def close(self) -> None: ...


class Receiver(Protocol):
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
    factory: Callable[..., Any] = getattr(import_module(TRANSPORTS[transport]), name)
    return factory
