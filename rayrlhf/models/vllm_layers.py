"""How a vLLM worker's model takes new weights: vLLM's own layer-wise reload, and a shorter way for plain models.

vLLM's serves every model and quantization. Its bookkeeping (each loader's pass over meta tensors, signatures bound,
every module taken apart and put together again) takes longer than the weights do where a model is small. An unquantized
one on a CPU needs little of it: tensors wait until their layer has all of them, the layer's own loaders write them
where it keeps them, and vLLM's own method packs what it packs: from the bucket itself, where the layer's tensors lie in
it as the layer wants them.

    begin()    model.load_weights(bucket), keep(buffer)    ... for each bucket ...    finish()
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import get_numel_loaded, materialize_meta_tensor, to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

__all__ = ["LayerwiseReload", "create_reload"]

# glibc's numbers, malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 2**30

PLAIN = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def create_reload(model: nn.Module, config: Any) -> LayerwiseReload:
    """`config`: vLLM's of the model."""
    layers = [layer for layer in model.modules() if any(p is not None for p in layer._parameters.values())]
    plain = next(model.parameters()).device.type == "cpu" and all(map(_is_plain, layers))
    return _PlainReload(model, config, layers) if plain else LayerwiseReload(model, config)


class LayerwiseReload:
    """vLLM's."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self._model, self._config = model, config

    def begin(self) -> None:
        initialize_layerwise_reload(self._model)

    def keep(self, buffer: torch.Tensor) -> None:
        """Copy what waits for its layer: the memory of `buffer` is about to be used again."""
        for layer in self._model.modules():
            for _, loading in get_layerwise_info(layer).loaded_weights:
                loading.arguments.update({name: _own(value, buffer) for name, value in loading.arguments.items()})

    def finish(self) -> None:
        finalize_layerwise_reload(self._model, self._config)

    @property
    def incomplete(self) -> set[str]:
        """Parameters of layers that did not get all of their weights, where they are known by layer: a head that is
        tied, and packed apart from the embedding, stays as it was unless its own name comes."""
        return set()


class _PlainReload(LayerwiseReload):
    def __init__(self, model: nn.Module, config: Any, layers: list[nn.Module]) -> None:
        super().__init__(model, config)
        _keep_freed_memory()
        self._filled: set[tuple[int, int]] = set()
        self._layers = [_PlainLayer(layer, self._filled) for layer in layers]
        names = {id(layer): name for name, layer in model.named_modules(remove_duplicate=False)}
        self._names = [names[id(layer)] for layer in layers]
        self._attention: list[Any] = [layer for layer in model.modules() if is_deferred_attention_layer(layer)]

    def begin(self) -> None:
        self._filled.clear()
        for layer in self._layers:
            layer.begin()

    def keep(self, buffer: torch.Tensor) -> None:
        self._filled.clear()
        for layer in self._layers:
            for part in layer.waiting:
                part.tensor = _own(part.tensor, buffer)

    def finish(self) -> None:
        for layer in self._layers:
            layer.finish()
        for attention in self._attention:
            attention.process_weights_after_loading(self._config.dtype)

    @property
    def incomplete(self) -> set[str]:
        layers = zip(self._names, self._layers, strict=True)
        return {f"{name}.{parameter}" for name, layer in layers if not layer.whole for parameter in layer.parameters}


@dataclass(slots=True)
class _Part:
    """What a parameter is loaded from: one tensor, and what else its loader is told."""

    name: str
    tensor: torch.Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]
    copied: _Copied


@dataclass(frozen=True, slots=True)
class _Copied:
    """What a loader does with a tensor."""

    numel: int
    source: int = -1
    """first byte of the tensor's that it copies; -1 where it does more than copy one run of bytes"""
    target: int = -1
    """byte of the parameter where that goes"""
    nbytes: int = 0


class _PlainLayer:
    """One layer: its parameters as the engine uses them, and meta tensors that stand in for them during an update."""

    def __init__(self, layer: Any, filled: set[tuple[int, int]]) -> None:
        """`filled`: (parameter, address) of what layers have loaded from this bucket."""
        self._filled = filled
        self.waiting: list[_Part] = []
        self._layer = layer
        self._used = {name: p for name, p in layer._parameters.items() if p is not None}
        unpacked, _ = get_layerwise_info(layer).restore_metadata
        self._stand_ins: dict[str, Any] = {
            name: restore_layer_refs(to_meta_tensor(unpacked.get(name, p)), layer) for name, p in self._used.items()
        }
        self._loaders = {n: getattr(p, "weight_loader", default_weight_loader) for n, p in self._stand_ins.items()}
        self._total = 0
        for name, stand_in in self._stand_ins.items():
            stand_in.weight_loader = self._noting(name)
            padded = isinstance(layer, VocabParallelEmbedding)  # by rows that do not come
            self._total += (stand_in[: layer.shard_indices.num_org_elements] if padded else stand_in).numel()
        self._copied: dict[Any, _Copied] = {}
        self._came = 0
        self._in_place = True
        """vLLM keeps nothing of what it packs from"""

    @property
    def whole(self) -> bool:
        """All of its weights have come since the update began."""
        return self._came >= self._total

    @property
    def parameters(self) -> list[str]:
        return list(self._used)

    def begin(self) -> None:
        self.waiting, self._came = [], 0
        self._layer._parameters.update(self._stand_ins)

    def _noting(self, name: str) -> Callable[..., None]:
        loader, stand_in = self._loaders[name], self._stand_ins[name]

        def note(_: torch.Tensor, tensor: torch.Tensor, *rest: Any, **named: Any) -> None:
            key = name, tensor.shape, tensor.stride(), rest, *named.items()
            if key not in self._copied:  # a shard takes its own part of the tensor
                self._copied[key] = _what_is_copied(loader, stand_in, tensor, *rest, **named)
            self.waiting.append(_Part(name, tensor, rest, named, self._copied[key]))
            self._came += self._copied[key].numel
            if self.whole:
                self.finish()

        return note

    def finish(self) -> None:
        """Load what waits, all of it or as much as came, and be as the engine uses it again."""
        if self.waiting:
            if not self._load(self._in_bucket() if self._in_place else {}):
                self._in_place = False
                self._load({})
            self.waiting = []
        self._layer._parameters.update(self._used)

    def _in_bucket(self) -> dict[str, torch.Tensor]:
        """What vLLM is about to pack, and has emptied when it did so before, as the bucket's own bytes."""
        packed = (name for name, p in self._used.items() if not p.numel())
        return {name: view for name in packed if (view := self._view(name)) is not None}

    def _view(self, name: str) -> torch.Tensor | None:
        """A parameter as the bucket's own bytes, if all of it lies there from end to end."""
        parts = sorted((part for part in self.waiting if part.name == name), key=lambda part: part.copied.target)
        stand_in, end = self._stand_ins[name], 0
        for part in parts:
            same = part.tensor.untyped_storage().data_ptr() == parts[0].tensor.untyped_storage().data_ptr()
            if not same or part.copied.target != end or _first(part) - end != _first(parts[0]):
                return None
            end += part.copied.nbytes
        if end != stand_in.nbytes:
            return None
        # A storage of its own, so that it shows whether anybody holds it.
        memory = parts[0].tensor.untyped_storage()
        bucket = torch.empty(0, dtype=torch.uint8).set_(memory).numpy()
        first = _first(parts[0]) - memory.data_ptr()
        view = torch.from_numpy(bucket[first : first + end]).view(stand_in.dtype).view(stand_in.shape)
        view.__class__, view.__dict__ = stand_in.__class__, stand_in.__dict__.copy()
        return view

    def _load(self, views: dict[str, torch.Tensor]) -> bool:
        """Fill and pack; False if vLLM computes with one of `views` from now on, whose memory will be used again."""
        held = [StorageWeakRef(view.untyped_storage()) for view in views.values()]  # type: ignore[no-untyped-call]
        whole = {
            n: p if p.numel() else views[n] if n in views else materialize_meta_tensor(self._stand_ins[n])
            for n, p in self._used.items()
        }
        self._layer._parameters.update(whole)
        for part in self.waiting:
            place = id(whole[part.name]), part.tensor.data_ptr()
            # A tied head is the embedding's parameter, and came with it.
            if part.name not in views and place not in self._filled:
                self._loaders[part.name](whole[part.name], part.tensor, *part.rest, **part.named)
            if whole[part.name] is self._used[part.name]:
                self._filled.add(place)
        self._pack()
        self._layer._parameters.update(self._used)
        views.clear()
        whole.clear()
        return all(storage.expired() for storage in held)  # type: ignore[no-untyped-call]

    def _pack(self) -> None:
        layer = self._layer
        method: Any = getattr(layer, "quant_method", None)

        def pack_and_multiply(*arguments: Any) -> Any:
            method.process_weights_after_loading(layer)
            return layer.cpu_linear(*arguments)

        if type(layer) is VocabParallelEmbedding:
            # What is looked up in needs no packing; what is a model's head as well gets it when it is used as one.
            layer.cpu_linear = pack_and_multiply
        elif method is not None:
            method.process_weights_after_loading(layer)


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is written, in order: (target, source) of a copy, None for anything else."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[torch.Tensor, torch.Tensor] | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.made.append(args[:2] if func is torch.ops.aten.copy_.default else None)
        return func(*args, **(kwargs or {}))


def _what_is_copied(loader: Any, stand_in: torch.Tensor, tensor: torch.Tensor, *rest: Any, **named: Any) -> _Copied:
    with _Copies() as copies:
        numel, _ = get_numel_loaded(loader, signature(loader).bind(stand_in, tensor, *rest, **named))
    if len(copies.made) != 1 or copies.made[0] is None:
        return _Copied(numel)
    target, source = copies.made[0]
    whole = target.is_contiguous() and source.is_contiguous() and source.dtype == target.dtype
    if not whole or source.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        return _Copied(numel)
    first = source.data_ptr() - tensor.data_ptr()
    return _Copied(numel, first, target.storage_offset() * target.itemsize, source.nbytes)


def _first(part: _Part) -> int:
    """Address of the first byte that is copied."""
    return part.tensor.data_ptr() + part.copied.source


def _is_plain(layer: nn.Module) -> bool:
    """Each of its parameters is used as it comes, or emptied once vLLM has packed it."""
    unpacked, _ = get_layerwise_info(layer).restore_metadata
    parameters = {name: p for name, p in layer._parameters.items() if p is not None}
    kept = all(p.ndim <= 2 and (not p.numel() or p.shape == unpacked.get(n, p).shape) for n, p in parameters.items())
    return kept and type(getattr(layer, "quant_method", None)) in PLAIN and not is_deferred_attention_layer(layer)


def _own(value: Any, buffer: torch.Tensor) -> Any:
    if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
        return value.clone()
    return value


def _keep_freed_memory() -> None:
    """Let this process keep large blocks that it freed, to pack the next layer from.

    glibc gives them back to the kernel at once, and faulting the pages in again costs more than the copy does.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, LARGEST_KEPT)
