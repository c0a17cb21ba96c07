"""What senders on a GPU pack into."""

from __future__ import annotations

import torch

__all__ = ["DeviceBuffers"]


class DeviceBuffers:
    """Two buffers on this process's GPU, in turn; one grows when a bucket is larger than any before it."""

    def __init__(self) -> None:
        self._two = [torch.empty(0, dtype=torch.uint8)] * 2
        self.turn = 0

    def next(self, nbytes: int) -> torch.Tensor:
        self.turn = 1 - self.turn
        if self.newest.numel() < nbytes:
            self._two[self.turn] = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        return self.newest

    @property
    def newest(self) -> torch.Tensor:
        return self._two[self.turn]
