"""Buckets to engines on other nodes: through Ray's object store to their node, then through shared memory as at home.

    policy rank 0                         an engine on another node
    attach_copy(ticket, buffer)   ->      Arrivals.localise(ticket)
    a copy in the object store            that copy in a segment of this node, and the ticket that names it

vLLM's workers are no Ray processes: whatever reaches a node must reach them through memory of that node.
"""

from __future__ import annotations

from typing import Any

import ray
import torch

from rayrlhf.weights.buckets import BucketHeader
from rayrlhf.weights.transports import Sender, create_sender

__all__ = ["Arrivals", "attach_copy"]

Ticket = dict[str, Any]


def attach_copy(ticket: Ticket, buffer: torch.Tensor) -> Ticket:
    """The ticket of a bucket that is in shared memory here, with a copy (`buffer`, uint8 [n]) for other nodes."""
    # In a list, or Ray would fetch it for whoever takes the ticket.
    return ticket | {"node": ray.get_runtime_context().get_node_id(), "copy": [ray.put(buffer.numpy())]}


class Arrivals:
    """The receiving side, one for each engine."""

    def __init__(self, transport: str, run: str) -> None:
        self._transport, self._run = transport, run
        self._segments: Sender | None = None

    def localise(self, ticket: Ticket) -> Ticket:
        """A ticket whose bytes are on this node: `ticket` itself where they are here already."""
        if "copy" not in ticket or ticket["node"] == ray.get_runtime_context().get_node_id():
            return {name: value for name, value in ticket.items() if name != "copy"}
        if self._segments is None:
            self._segments = create_sender(self._transport, self._run)
        header, came = BucketHeader.from_dict(ticket["header"]), ray.get(ticket["copy"][0])
        self._segments.reserve(header.nbytes)[: header.nbytes].numpy()[:] = came
        return self._segments.send(header)

    def close(self) -> None:
        if self._segments is not None:
            self._segments.close()
