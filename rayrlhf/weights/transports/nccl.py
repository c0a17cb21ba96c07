"""NCCL, for engines on GPUs of their own: policy rank 0 broadcasts each bucket to every worker of every engine.

The communicator is vLLM's own for weight transfer. An engine that dies within a publish leaves the others waiting in
it: with this transport the call's deadline then ends the run. Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch

from rayrlhf.weights.buckets import BucketHeader
from rayrlhf.weights.transports import Meeting

__all__ = ["create_receiver", "create_sender"]

SEGMENTS = 2
cuda: Any = torch.cuda  # whose streams and events have no types


def create_sender(run: str) -> _Sender:
    return _Sender()


def create_receiver() -> _Receiver:
    return _Receiver()


def _join(meeting: Meeting) -> Any:
    from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

    device = cuda.current_device()
    return stateless_init_process_group(meeting.address, meeting.port, meeting.rank, meeting.world_size, device)


class _Sender:
    def __init__(self) -> None:
        self._buffers: list[torch.Tensor | None] = [None] * SEGMENTS
        self._sent: list[Any] = [None] * SEGMENTS
        self._turn = 0

    def meet(self, meeting: Meeting) -> None:
        self._group = _join(meeting)
        self._stream = cuda.Stream()

    def reserve(self, nbytes: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % SEGMENTS
        if (sent := self._sent[self._turn]) is not None:
            sent.synchronize()  # its last broadcast has read it
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._buffers[self._turn] = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        return buffer

    def send(self, header: BucketHeader) -> dict[str, Any]:
        buffer = self._buffers[self._turn]
        assert buffer is not None
        # Started, not waited for: it runs once the engines join in, and the next bucket is packed meanwhile.
        self._stream.wait_stream(cuda.current_stream())
        self._group.broadcast(buffer[: header.nbytes], src=0, stream=self._stream)
        sent = self._sent[self._turn] = cuda.Event()
        sent.record(self._stream)
        return {"header": header.to_dict()}

    def close(self) -> None:
        self._buffers = [None] * SEGMENTS


class _Receiver:
    def meet(self, meeting: Meeting) -> None:
        self._group = _join(meeting)

    def receive(self, ticket: dict[str, Any]) -> torch.Tensor:
        # A buffer for each bucket: the engine's loader keeps references until a layer is complete.
        buffer = torch.empty(BucketHeader.from_dict(ticket["header"]).nbytes, dtype=torch.uint8, device="cuda")
        self._group.broadcast(buffer, src=0, stream=cuda.current_stream())
        cuda.current_stream().synchronize()
        return buffer

    def close(self) -> None:
        """The communicator ends with its process."""
