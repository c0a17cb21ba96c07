"""Buckets: many parameters as one run of bytes, with the header that says how to cut it up again.

A publish moves the weights bucket by bucket, one call each, so its cost grows with bytes and not with the
number of parameters. The fingerprint covers the header and the bytes: a swapped name, a bucket of another
version or a flipped bit all change it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

__all__ = ["BucketHeader", "TensorSpec", "bucket_plan", "device_sums", "fingerprint", "pack", "publish_names", "unpack"]

# Tensors start at multiples of this, so that a view in any dtype is aligned.
ALIGNMENT = 64
# Odd, and without a pattern in their bits: the golden ratio's and pi's first 63.
MIXERS = (0x4F1BBCDCBFA53E0B, 0x3243F6A8885A308D)
SUMMED = 2**23


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one tensor lies in its bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class BucketHeader:
    """What travels as scalars: everything about a bucket except its bytes."""

    version: int
    index: int
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return max(spec.offset + spec.nbytes for spec in self.specs)

    @property
    def places(self) -> list[tuple[int, int]]:
        """(offset, bytes) of what lies in the bucket, each once even where two names share it."""
        return list(dict.fromkeys((spec.offset, spec.nbytes) for spec in self.specs))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers: what vLLM's weight-transfer calls can carry to its worker processes."""
        return {
            "version": self.version,
            "index": self.index,
            "specs": [[s.name, s.dtype, list(s.shape), s.offset] for s in self.specs],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BucketHeader:
        specs = tuple(TensorSpec(n, d, tuple(int(x) for x in s), int(o)) for n, d, s, o in data["specs"])
        return cls(int(data["version"]), int(data["index"]), specs)


def publish_names(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) in module order, one entry per name even where two names share a parameter.

    The names are a Hugging Face checkpoint's. A tied head shares its parameter with the embedding. An engine that packs
    its head for fast products keeps a copy of it, and that copy stays old, silently, unless the head is sent under its
    own name too.
    """
    return list(module.named_parameters(remove_duplicate=False))


def bucket_plan(sizes: Iterable[tuple[str, int]], bucket_bytes: int, smaller: int = 0) -> list[list[str]]:
    """Group (name, bytes) in order into buckets of at most `bucket_bytes`; a larger tensor gets its own.

    A second name of the tensor before it has 0 bytes, and goes with it. The first `smaller` buckets are smaller, each
    half of the next: engines begin sooner.
    """
    plan: list[list[str]] = []
    room = 0
    for name, nbytes in sizes:
        aligned = _aligned(nbytes)
        if not plan or aligned > max(room, 0):
            plan.append([])
            room = bucket_bytes >> max(0, smaller + 1 - len(plan))
        plan[-1].append(name)
        room -= aligned
    return plan


def pack(
    tensors: Sequence[tuple[str, torch.Tensor]], version: int, index: int, reserve: Any
) -> tuple[BucketHeader, torch.Tensor]:
    """Copy `tensors` into one uint8 buffer, one that comes under two names once.

    Args:
        reserve: called with the number of bytes; returns a uint8 tensor of at least that size to write into
            (the transport's own memory, so that packing is the only copy on the sender's side).
    """
    specs, offset = [], 0
    placed: dict[Any, int] = {}
    for name, tensor in tensors:
        place = placed.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), offset)
        specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), place))
        offset += _aligned(tensor.nbytes) if place == offset else 0
    header = BucketHeader(version, index, tuple(specs))
    buffer: torch.Tensor = reserve(header.nbytes)[: header.nbytes]
    once = {(spec.offset, spec.nbytes): (spec, tensor) for spec, (_, tensor) in zip(specs, tensors, strict=True)}
    for spec, tensor in once.values():
        _view(buffer, spec).copy_(tensor)
    return header, buffer


def unpack(header: BucketHeader, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Views into `buffer`, one per tensor; the caller owns the buffer for as long as the views live."""
    for spec in header.specs:
        yield spec.name, _view(buffer, spec)


def fingerprint(header: BucketHeader, buffer: torch.Tensor) -> str:
    """128-bit xxh3 over the header and every tensor's bytes (the gaps between them are not covered).

    Bytes on a GPU stay there: the hash is then over `device_sums` of each tensor. Both sides hold a bucket on the same
    kind of device, so both take the same way.
    """
    digest = xxhash.xxh3_128(repr(header).encode())
    parts = [buffer[offset : offset + nbytes] for offset, nbytes in header.places]
    if buffer.is_cuda:
        digest.update(torch.stack([device_sums(part) for part in parts]).cpu().numpy().data)
    else:
        for part in parts:
            digest.update(part.numpy().data)
    return digest.hexdigest()


def device_sums(data: torch.Tensor) -> torch.Tensor:
    """Two sums of uint8 [n] read as 64-bit words, each word times an odd factor that depends on its place, modulo 2^64.

    A flipped bit changes a sum by an odd multiple of a power of two below 2^64, so never by 0; words that changed
    places change both, but for chance.

    Returns:
        int64 [2], on the device of `data`.
    """
    sums = torch.zeros(2, dtype=torch.int64, device=data.device)
    for start in range(0, data.numel(), SUMMED):  # a piece at a time: beside it are four of its size
        piece = data[start : start + SUMMED]
        words = torch.nn.functional.pad(piece, (0, -piece.numel() % 8)).view(torch.int64)
        places = torch.arange(1, words.numel() + 1, dtype=torch.int64, device=data.device) + start // 8
        sums += torch.stack([(words * ((places * k) ^ ((places * k) >> 29) | 1)).sum() for k in MIXERS])
    return sums


def _view(buffer: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    raw = buffer[spec.offset : spec.offset + spec.nbytes]
    return raw.view(getattr(torch, spec.dtype)).view(spec.shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
