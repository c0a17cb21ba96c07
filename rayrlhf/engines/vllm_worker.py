"""What runs inside a vLLM worker process: the receiving end of a publish.

vLLM loads this module in every worker (`worker_extension_cls`), which registers `WeightReceiver` with vLLM's own
weight-transfer factory under `BACKEND`. vLLM then drives it: start_weight_update, update_weights once per bucket,
finish_weight_update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rayrlhf.models.vllm_layers import create_reload
from rayrlhf.weights.buckets import BucketHeader, fingerprint, unpack
from rayrlhf.weights.transports import Meeting, Receiver, create_receiver

__all__ = ["BACKEND", "WeightReceiver", "WorkerExtension"]

BACKEND = "rayrlhf"
# A process has to ask the kernel before it uses AMX. oneDNN does at its first large product in bfloat16; vLLM's
# attention does not, and where all products are small the first token would end the engine (SIGILL).
torch.cpu._init_amx()


@dataclass
class InitInfo(WeightTransferInitInfo):
    transport: str


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    ticket: dict[str, Any]


class WeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives buckets through any of our transports and loads them layer by layer."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._receiver: Receiver = create_receiver(init_info.transport)
        self._held = {name for name, _ in self.model.named_parameters()}
        self._reload = create_reload(self.model, self.model_config)
        self._begin()

    def meet(self, meeting: Meeting) -> None:
        self._receiver.meet(meeting)

    def _begin(self) -> None:
        self.fingerprints: list[str] = []
        """of the buckets that this update has got"""
        self.seconds = dict.fromkeys(("transfer_s", "fingerprint_s", "load_s"), 0.0)
        self._loaded: set[str] = set()

    def start_weight_update(self) -> None:
        self._begin()
        with self._timed("load_s"):
            self._reload.begin()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        header = BucketHeader.from_dict(update_info.ticket["header"])
        with self._timed("transfer_s"):
            buffer = self._receiver.receive(update_info.ticket)
        with self._timed("load_s"):
            tensors = ((name, tensor.to(self.device)) for name, tensor in unpack(header, buffer))
            self._loaded |= self.model.load_weights(tensors)
            self._keep_what_waits(buffer)
        # Last: the bytes are still the sender's, and one that changed while they were loaded must show.
        with self._timed("fingerprint_s"):
            self.fingerprints.append(fingerprint(header, buffer))

    def _keep_what_waits(self, buffer: torch.Tensor) -> None:
        """vLLM holds tensors until a layer is complete, and the sender uses the buffer's memory again: copy those."""
        self._reload.keep(buffer)

    def finish_weight_update(self) -> None:
        with self._timed("load_s"):
            self._reload.finish()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[part] += perf_counter() - start

    @property
    def missing(self) -> list[str]:
        """Parameters the engine holds that this update has not reached."""
        return sorted((self._held - self._loaded) | self._reload.incomplete)

    def shutdown(self) -> None:
        if hasattr(self, "_receiver"):
            self._receiver.close()


class WorkerExtension:
    """Methods vLLM mixes into its worker, reached through `collective_rpc`."""

    weight_transfer_engine: WeightReceiver
    vllm_config: Any

    def weight_receipt(self) -> tuple[list[str], list[str], dict[str, float]]:
        """(fingerprints of the buckets got, parameters not covered, seconds by part) of the newest update."""
        engine = self.weight_transfer_engine
        return engine.fingerprints, engine.missing, engine.seconds

    def abandon_weight_update(self) -> None:
        """End an update that broke off half-way: what came of it must not count towards the layers of the next."""
        with set_current_vllm_config(self.vllm_config):
            self.weight_transfer_engine.finish_weight_update()
        self._weight_update_active = False

    def meet_sender(self, meeting: dict[str, Any]) -> None:
        """Join the sender's group; `meeting` has the rank of this engine's first worker."""
        engine = self.weight_transfer_engine
        engine.meet(Meeting(**{**meeting, "rank": meeting["rank"] + engine.parallel_config.rank}))

    def memory_bytes(self) -> int:
        """Device memory in use on a GPU; 0 on CPU, where the actor's own resident size tells."""
        return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, WeightReceiver)
