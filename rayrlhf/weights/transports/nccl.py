"""NCCL, for engines on GPUs of their own: policy rank 0 broadcasts each bucket to every worker of every engine.

The communicator is vLLM's own for weight transfer. Whoever waits in a broadcast longer than `PATIENCE_S` for one who
does not come aborts it, and the publish fails where it waited; the next one meets anew, without those that are lost.
Not run on a GPU yet.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from rayrlhf.errors import WeightSyncError
from rayrlhf.weights.buckets import BucketHeader
from rayrlhf.weights.transports import Meeting
from rayrlhf.weights.transports.device import DeviceBuffers

__all__ = ["create_receiver", "create_sender"]

# Less than any call of an engine may take: one that waits must not be taken for one that hangs.
PATIENCE_S = 30.0
cuda: Any = torch.cuda  # whose streams and events have no types


def create_sender(run: str) -> _Sender:
    return _Sender()


def create_receiver() -> _Receiver:
    return _Receiver()


class _Member:
    """Of a group, until it meets anew."""

    _group: Any = None

    def meet(self, meeting: Meeting) -> None:
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        self._leave()
        device = cuda.current_device()
        self._group = stateless_init_process_group(
            meeting.address, meeting.port, meeting.rank, meeting.world_size, device
        )

    def _leave(self) -> None:
        if self._group is not None:
            self._group.destroy()  # aborts what it waits in
        self._group = None

    def _broadcast(self, buffer: torch.Tensor, stream: Any) -> Any:
        """Started, not waited for; an event that tells when it is over."""
        if self._group is None:
            raise WeightSyncError("this broadcast was given up", "the next publish meets anew")
        self._group.broadcast(buffer, src=0, stream=stream)
        over = cuda.Event()
        over.record(stream)
        return over

    def _wait(self, over: Any) -> None:
        end = time.monotonic() + PATIENCE_S
        while not over.query():
            if time.monotonic() > end:
                self._leave()
                raise WeightSyncError(f"a broadcast was not over after {PATIENCE_S:g} s", "see logs/ of the engines")
            time.sleep(1e-4)

    def close(self) -> None:
        self._leave()


class _Sender(_Member):
    def __init__(self) -> None:
        self._buffers = DeviceBuffers()
        self._sent: dict[int, Any] = {}

    def meet(self, meeting: Meeting) -> None:
        super().meet(meeting)
        self._stream, self._sent = cuda.Stream(), {}

    def reserve(self, nbytes: int) -> torch.Tensor:
        if sent := self._sent.pop(1 - self._buffers.turn, None):
            self._wait(sent)  # it has read the buffer whose turn it is
        return self._buffers.next(nbytes)

    def send(self, header: BucketHeader) -> dict[str, Any]:
        # It runs once the engines join in, and the next bucket is packed meanwhile.
        self._stream.wait_stream(cuda.current_stream())
        self._sent[self._buffers.turn] = self._broadcast(self._buffers.newest[: header.nbytes], self._stream)
        return {"header": header.to_dict()}


class _Receiver(_Member):
    def receive(self, ticket: dict[str, Any]) -> torch.Tensor:
        # A buffer for each bucket: the engine's loader keeps references until a layer is complete.
        buffer = torch.empty(BucketHeader.from_dict(ticket["header"]).nbytes, dtype=torch.uint8, device="cuda")
        self._wait(self._broadcast(buffer, cuda.current_stream()))
        return buffer
