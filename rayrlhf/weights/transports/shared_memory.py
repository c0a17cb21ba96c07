"""Shared memory on one host: two memory-mapped files in /dev/shm, written by the sender in turn."""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from rayrlhf.errors import WeightSyncError
from rayrlhf.weights.buckets import BucketHeader
from rayrlhf.weights.transports import Meeting

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
        self._file: IO[bytes] | None = None

    def at_least(self, nbytes: int) -> torch.Tensor:
        if self.buffer is None or self.buffer.numel() < nbytes:
            self.unlink()  # a receiver that still maps the old file keeps it; this one is new
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            self._file = open(descriptor, "r+b")  # noqa: SIM115 (held open: the lock lives as long as the file)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                # Claim the memory now: a /dev/shm that fills up later would kill the process in the middle of a write.
                os.posix_fallocate(descriptor, 0, nbytes)
            except OSError as error:
                self.unlink()
                raise WeightSyncError(
                    f"{self.path.parent}: no room for a bucket of {nbytes / 2**20:.0f} MiB ({error.strerror})",
                    "lower weights.bucket_mib, or give the machine (the container) more shared memory",
                ) from None
            self.buffer = torch.frombuffer(mmap.mmap(descriptor, nbytes), dtype=torch.uint8)
        return self.buffer

    def unlink(self) -> None:
        self.buffer = None
        self.path.unlink(missing_ok=True)
        if self._file is not None:
            self._file.close()
            self._file = None


class _Sender:
    def __init__(self, run: str) -> None:
        folder = Path("/dev/shm")
        folder = folder if folder.is_dir() else Path(tempfile.gettempdir())
        _remove_orphans(folder)
        self._segments = [_Segment(folder / f"{PREFIX}{run}-{os.getpid()}-{i}") for i in range(SEGMENTS)]
        self._turn = 0

    def meet(self, meeting: Meeting) -> None:
        """The ticket says everything."""

    def reserve(self, nbytes: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % SEGMENTS
        return self._segments[self._turn].at_least(nbytes)

    def send(self, header: BucketHeader) -> dict[str, Any]:
        return {"header": header.to_dict(), "path": str(self._segments[self._turn].path)}

    def close(self) -> None:
        for segment in self._segments:
            segment.unlink()


class _Receiver:
    """Looks at the sender's own memory, without a copy."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, torch.Tensor]] = {}

    def meet(self, meeting: Meeting) -> None:
        """The ticket says everything."""

    def receive(self, ticket: dict[str, Any]) -> torch.Tensor:
        header, path = BucketHeader.from_dict(ticket["header"]), ticket["path"]
        with open(path, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if self._seen.get(path, (None,))[0] != inode:  # the sender makes a new file when it needs a larger one
                mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch has no tensors that may not be written to
                    self._seen[path] = inode, torch.frombuffer(mapped, dtype=torch.uint8)
        return self._seen[path][1][: header.nbytes]

    def close(self) -> None:
        self._seen.clear()


def _remove_orphans(folder: Path) -> None:
    """Unlink segments whose sender was killed before it could close: nobody holds their lock any more."""
    for path in folder.glob(f"{PREFIX}*-*-[0-9]"):
        with suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
