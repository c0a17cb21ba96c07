"""CUDA IPC, for engines that share their GPU with a rank of the policy: the engine copies from that rank's memory.

Every rank packs the bucket (ZeRO-3 gathers it on all of them) and sends a handle under its GPU's id; a worker takes the
one of its own GPU. Not run on a GPU yet.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch.multiprocessing import reductions as torch_reductions

from rayrlhf.errors import WeightSyncError
from rayrlhf.weights.buckets import BucketHeader
from rayrlhf.weights.transports import Meeting
from rayrlhf.weights.transports.device import DeviceBuffers

__all__ = ["create_receiver", "create_sender"]

reductions: Any = torch_reductions  # which have no types
DEVICE_ARGUMENT = 6
"""of torch's rebuild_cuda_tensor: the sender's number of the GPU, which the receiver may count otherwise"""


def create_sender(run: str) -> _Sender:
    return _Sender()


def create_receiver() -> _Receiver:
    return _Receiver()


def _gpu() -> str:
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


class _Sender:
    def __init__(self) -> None:
        self._buffers = DeviceBuffers()

    def meet(self, meeting: Meeting) -> None:
        """The ticket says everything."""

    def reserve(self, nbytes: int) -> torch.Tensor:
        return self._buffers.next(nbytes)

    def send(self, header: BucketHeader) -> dict[str, Any]:
        torch.cuda.current_stream().synchronize()  # the other process sees memory, not this one's queue
        _, arguments = reductions.reduce_tensor(self._buffers.newest)
        return {"header": header.to_dict(), "handles": {_gpu(): pickle.dumps(arguments)}}

    def close(self) -> None:
        self._buffers = DeviceBuffers()


class _Receiver:
    def meet(self, meeting: Meeting) -> None:
        """The ticket says everything."""

    def receive(self, ticket: dict[str, Any]) -> torch.Tensor:
        gpu = _gpu()
        if gpu not in ticket["handles"]:
            raise WeightSyncError(
                f"no rank of the policy is on this engine's GPU ({gpu}); there are {sorted(ticket['handles'])}",
                "weights.transport=ipc is for shared GPUs: take nccl, or give each engine worker a policy rank's GPU",
            )
        arguments = list(pickle.loads(ticket["handles"][gpu]))
        arguments[DEVICE_ARGUMENT] = torch.cuda.current_device()
        theirs: torch.Tensor = reductions.rebuild_cuda_tensor(*arguments)
        # A copy of its own: the engine's loader keeps references, and the sender uses the buffer again.
        buffer = theirs[: BucketHeader.from_dict(ticket["header"]).nbytes].clone()
        torch.cuda.current_stream().synchronize()
        return buffer

    def close(self) -> None:
        """Nothing is held between buckets."""
