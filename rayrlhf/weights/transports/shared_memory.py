"""Shared memory on one host: two memory-mapped files in /dev/shm, written by the sender in turn."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from rayrlhf.weights.buckets import BucketHeader

__all__ = ["create_receiver", "create_sender"]

SEGMENTS = 2
PREFIX = "rayrlhf-"


def create_sender(run: str) -> _Sender:
    return _Sender(run)


def create_receiver() -> _Receiver:
    return _Receiver()


class _Segment:
    """One file and its mapping; grows when a bucket is larger than any before it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.buffer: torch.Tensor | None = None

    def at_least(self, nbytes: int) -> torch.Tensor:
        if self.buffer is None or self.buffer.numel() < nbytes:
            self.unlink()  # a receiver that still maps the old file keeps it; this one is new
            with open(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "r+b") as file:
                file.truncate(nbytes)
                mapping = mmap.mmap(file.fileno(), nbytes)
            self.buffer = torch.frombuffer(mapping, dtype=torch.uint8)
        return self.buffer

    def unlink(self) -> None:
        self.buffer = None
        self.path.unlink(missing_ok=True)


class _Sender:
    def __init__(self, run: str) -> None:
        folder = Path("/dev/shm")
        folder = folder if folder.is_dir() else Path(tempfile.gettempdir())
        _remove_orphans(folder)
        self._segments = [_Segment(folder / f"{PREFIX}{run}-{os.getpid()}-{i}") for i in range(SEGMENTS)]
        self._turn = 0

    def reserve(self, nbytes: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % SEGMENTS
        return self._segments[self._turn].at_least(nbytes)

    def send(self, header: BucketHeader) -> dict[str, Any]:
        return {"header": header.to_dict(), "path": str(self._segments[self._turn].path)}

    def close(self) -> None:
        for segment in self._segments:
            segment.unlink()


class _Receiver:
    def receive(self, ticket: dict[str, Any]) -> torch.Tensor:
        header = BucketHeader.from_dict(ticket["header"])
        # A copy of its own per bucket: the engine's loader keeps references until a layer is complete, and the
        # sender overwrites the segment two buckets later.
        buffer = torch.empty(header.nbytes, dtype=torch.uint8)
        with open(ticket["path"], "rb") as file:
            file.readinto(buffer.numpy().data)
        return buffer

    def close(self) -> None:
        """Nothing is held between buckets."""


def _remove_orphans(folder: Path) -> None:
    """Unlink segments whose sender was killed before it could close."""
    for path in folder.glob(f"{PREFIX}*-*-[0-9]"):
        pid = path.name.rsplit("-", 2)[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
