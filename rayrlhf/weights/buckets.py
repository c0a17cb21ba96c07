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

__all__ = ["BucketHeader", "TensorSpec", "bucket_plan", "fingerprint", "pack", "unpack"]

# Tensors start at multiples of this, so that a view in any dtype is aligned.
ALIGNMENT = 64


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
        last = self.specs[-1]
        return last.offset + last.nbytes

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


def bucket_plan(sizes: Iterable[tuple[str, int]], bucket_bytes: int) -> list[list[str]]:
    """Group (name, bytes) in order into buckets of at most `bucket_bytes`; a larger tensor gets its own."""
    plan: list[list[str]] = []
    room = 0
    for name, nbytes in sizes:
        aligned = _aligned(nbytes)
        if not plan or aligned > room:
            plan.append([])
            room = bucket_bytes
        plan[-1].append(name)
        room -= aligned
    return plan


def pack(
    tensors: Sequence[tuple[str, torch.Tensor]], version: int, index: int, reserve: Any
) -> tuple[BucketHeader, torch.Tensor]:
    """Copy `tensors` into one uint8 buffer.

    Args:
        reserve: called with the number of bytes; returns a uint8 tensor of at least that size to write into
            (the transport's own memory, so that packing is the only copy on the sender's side).
    """
    specs, offset = [], 0
    for name, tensor in tensors:
        specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset))
        offset += _aligned(tensor.nbytes)
    header = BucketHeader(version, index, tuple(specs))
    buffer: torch.Tensor = reserve(header.nbytes)[: header.nbytes]
    for spec, (_, tensor) in zip(specs, tensors, strict=True):
        _view(buffer, spec).copy_(tensor)
    return header, buffer


def unpack(header: BucketHeader, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Views into `buffer`, one per tensor; the caller owns the buffer for as long as the views live."""
    for spec in header.specs:
        yield spec.name, _view(buffer, spec)


def fingerprint(header: BucketHeader, buffer: torch.Tensor) -> str:
    """128-bit xxh3 over the header and every tensor's bytes (the gaps between them are not covered)."""
    digest = xxhash.xxh3_128(repr(header).encode())
    for spec in header.specs:
        digest.update(buffer[spec.offset : spec.offset + spec.nbytes].numpy().data)
    return digest.hexdigest()


def _view(buffer: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    raw = buffer[spec.offset : spec.offset + spec.nbytes]
    return raw.view(getattr(torch, spec.dtype)).view(spec.shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
