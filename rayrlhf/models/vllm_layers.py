"""How a vLLM worker's model takes new weights: vLLM's own layer-wise reload, and a shorter way for plain models.

vLLM's serves every model and quantization. Its bookkeeping (each loader's pass over meta tensors, signatures bound,
every module taken apart and put together again) takes longer than the weights do where a model is small. An unquantized
one on a CPU needs little of it: tensors wait until their layer has all of them, the layer's own loaders write them
where it keeps them, or into memory to pack from, and vLLM's own method packs.

    begin()    model.load_weights(bucket), keep(buffer)    ... for each bucket ...    finish()
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import nn
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
            layer.waiting = [(name, _own(tensor, buffer), *rest) for name, tensor, *rest in layer.waiting]

    def finish(self) -> None:
        for layer in self._layers:
            layer.finish()
        for attention in self._attention:
            attention.process_weights_after_loading(self._config.dtype)

    @property
    def incomplete(self) -> set[str]:
        layers = zip(self._names, self._layers, strict=True)
        return {f"{name}.{parameter}" for name, layer in layers if not layer.whole for parameter in layer.parameters}


class _PlainLayer:
    """One layer: its parameters as the engine uses them, and meta tensors that stand in for them during an update."""

    def __init__(self, layer: Any, filled: set[tuple[int, int]]) -> None:
        """`filled`: (parameter, address) of what layers have loaded from this bucket."""
        self._filled = filled
        self.waiting: list[tuple[str, torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []
        """(parameter, what it is loaded from, what else its loader is told)"""
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
        self._counts: dict[Any, int] = {}
        self._came = 0

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
            key = name, tensor.shape, rest, *named.items()
            if key not in self._counts:  # a shard takes its own part of the tensor
                self._counts[key], _ = get_numel_loaded(
                    loader, signature(loader).bind(stand_in, tensor, *rest, **named)
                )
            self.waiting.append((name, tensor, rest, named))
            self._came += self._counts[key]
            if self.whole:
                self.finish()

        return note

    def finish(self) -> None:
        """Load what waits, all of it or as much as came, and be as the engine uses it again."""
        if self.waiting:
            # vLLM empties a parameter that it has packed.
            whole = {n: p if p.numel() else materialize_meta_tensor(self._stand_ins[n]) for n, p in self._used.items()}
            self._layer._parameters.update(whole)
            for name, tensor, rest, named in self.waiting:
                place = id(whole[name]), tensor.data_ptr()
                if place not in self._filled:  # a tied head is the embedding's parameter, and came with it
                    self._loaders[name](whole[name], tensor, *rest, **named)
                if whole[name] is self._used[name]:
                    self._filled.add(place)
            if (method := getattr(self._layer, "quant_method", None)) is not None:
                method.process_weights_after_loading(self._layer)
            self.waiting = []
        self._layer._parameters.update(self._used)


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
