"""What runs inside a vLLM worker process: the receiving end of a publish.

vLLM loads this module in every worker (`worker_extension_cls`), which registers `WeightReceiver` with vLLM's own
weight-transfer factory under `BACKEND`. vLLM then drives it: start_weight_update, update_weights once per bucket,
finish_weight_update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rayrlhf.weights.buckets import BucketHeader, fingerprint, unpack
from rayrlhf.weights.transports import Receiver, create_receiver

__all__ = ["BACKEND", "WeightReceiver", "WorkerExtension"]

BACKEND = "rayrlhf"


@dataclass
class InitInfo(WeightTransferInitInfo):
    transport: str


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    ticket: dict[str, Any]


class WeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives buckets through any of our transports and hands them to vLLM's layer-wise reload."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._receiver: Receiver = create_receiver(init_info.transport)
        self._held = {name for name, _ in self.model.named_parameters()}
        self.fingerprints: list[str] = []
        self._loaded: set[str] = set()

    def start_weight_update(self) -> None:
        self.fingerprints = []
        self._loaded = set()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        header = BucketHeader.from_dict(update_info.ticket["header"])
        buffer = self._receiver.receive(update_info.ticket)
        self.fingerprints.append(fingerprint(header, buffer))
        tensors = ((name, tensor.to(self.device)) for name, tensor in unpack(header, buffer))
        self._loaded |= self.model.load_weights(tensors)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    @property
    def missing(self) -> list[str]:
        """Parameters the engine holds that this update has not reached."""
        return sorted(self._held - self._loaded)

    def shutdown(self) -> None:
        if hasattr(self, "_receiver"):
            self._receiver.close()


class WorkerExtension:
    """Methods vLLM mixes into its worker, reached through `collective_rpc`."""

    weight_transfer_engine: WeightReceiver

    def weight_receipt(self) -> tuple[list[str], list[str]]:
        """(fingerprints of the buckets got, parameters not covered) of the update in progress."""
        engine = self.weight_transfer_engine
        return engine.fingerprints, engine.missing

    def abandon_weight_update(self) -> None:
        """Forget an update that broke off half-way, so that the next one can start."""
        if getattr(self, "_weight_update_active", False):
            self._weight_update_active = False

    def memory_bytes(self) -> int:
        """Device memory in use on a GPU; 0 on CPU, where the actor's own resident size tells."""
        return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, WeightReceiver)
