"""Tensors that leave their device and come back in place: whatever else points into their memory stays right."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, UntypedStorage, nn

__all__ = ["Part", "Residence", "tensors_within", "weights_of"]

Part = Literal["none", "weights", "all"]
"""What of a model is on its device: nothing, what a forward pass needs, or what an optimizer step needs as well."""


class Residence:
    """Which parts of a model are on its device. The others wait on the host, in pinned memory where there is a GPU.

    A storage on the host has size 0 on its device, so views of it (DeepSpeed cuts parameters and shards out of flat
    buffers) come back with it, and whoever touches one that is away gets an error, not numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._away: dict[str, list[tuple[UntypedStorage, Tensor]]] = {}

    def occupy(self, part: Part, weights: Collection[Tensor], rest: Iterable[Tensor]) -> None:
        """Let exactly `part` be on the device: what is not wanted leaves before what is wanted comes.

        Args:
            weights: of the model.
            rest: everything else, weights among it or not.
        """
        if part != "all" and "rest" not in self._away:
            # Those of the weights must not leave with it; what has size 0 is away already.
            kept = {storage.data_ptr() for storage in self._storages(weights)}
            self._leave("rest", [s for s in self._storages(rest) if s.data_ptr() not in kept])
        if part == "none" and "weights" not in self._away:
            self._leave("weights", self._storages(weights))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # for the others on this device
        if part != "none":
            self._return("weights")
        if part == "all":
            self._return("rest")

    def _leave(self, name: str, storages: Iterable[UntypedStorage]) -> None:
        pinned = self._device.type == "cuda"
        self._away[name] = []
        for storage in storages:
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
            host.copy_(_bytes(storage))
            self._away[name].append((storage, host))
            storage.resize_(0)

    def _return(self, name: str) -> None:
        for storage, host in self._away.pop(name, []):
            storage.resize_(host.numel())
            _bytes(storage).copy_(host)

    def _storages(self, tensors: Iterable[Tensor]) -> Iterator[UntypedStorage]:
        """Each once, if there is anything in it here that is not a mapped file: that costs nothing to leave."""
        here = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == self._device.type)
        return iter(
            {storage.data_ptr(): storage for storage in here if storage.nbytes() and storage.resizable()}.values()
        )


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers. ZeRO-3 has this rank's part of a parameter apart, and keeps small ones whole as well."""
    for parameter in module.parameters():
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor
        second: Tensor | None = getattr(parameter, "ds_secondary_tensor", None)
        if second is not None:  # hpZ's
            yield second
    yield from module.buffers()


def tensors_within(things: Any, depth: int = 4) -> Iterator[Tensor]:
    """All tensors in these containers, and in containers in them."""
    if isinstance(things, Tensor):
        yield things
        if things.grad is not None:
            yield things.grad
    elif depth and isinstance(things, Mapping):
        for thing in [*things, *things.values()]:  # torch's optimizers keep their state by parameter
            yield from tensors_within(thing, depth - 1)
    elif depth and is_dataclass(things):  # DeepSpeed's buckets
        yield from tensors_within(vars(things), depth - 1)
    elif depth and isinstance(things, (list, tuple)):
        for thing in things:
            yield from tensors_within(thing, depth - 1)
