"""One process group per role: start it, reduce numbers over it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = [
    "Rendezvous",
    "all_reduce_max",
    "all_reduce_sum",
    "form_group",
    "join_process_group",
    "listen",
    "prepare_process",
    "reduce_means",
]


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """What a rank needs to find the others of its role."""

    rank: int
    world_size: int
    address: str
    port: int
    device: str
    threads: int
    deterministic: bool


def join_process_group(rendezvous: Rendezvous) -> None:
    """Start DeepSpeed's process group in this process, of which Ray shows its own device only."""
    os.environ.update(RANK=str(rendezvous.rank), WORLD_SIZE=str(rendezvous.world_size), LOCAL_RANK="0", LOCAL_SIZE="1")
    prepare_process(rendezvous.device, rendezvous.threads, rendezvous.deterministic)
    form_group(rendezvous)


_listening: dict[tuple[str, int], socket.socket] = {}


def listen(address: str) -> tuple[str, int]:
    """A place at which this process, rank 0 of a group to come, listens from now on: a port that was only looked for
    might be another's before the group forms."""
    server = socket.create_server((address, 0), family=_family(address))
    place = address, int(server.getsockname()[1])
    _listening[place] = server
    return place


def form_group(rendezvous: Rendezvous) -> None:
    """DeepSpeed's process group, of processes that are prepared: gloo on CPU, NCCL on GPUs.

    Rank 0 listens at the address that the others are told, and at no other: torch's own store listens on every network.
    """
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    place, rank, world, listening = (rendezvous.address, rendezvous.port), rendezvous.rank, rendezvous.world_size, None
    if rank == 0:
        server = _listening.pop(place, None) or socket.create_server(place, family=_family(rendezvous.address))
        listening = server.detach()
    store = TCPStore(*place, world, rank == 0, default_pg_timeout, master_listen_fd=listening)
    backend = "nccl" if rendezvous.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=default_pg_timeout, rank=rank, world_size=world, store=store)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def prepare_process(device: str, threads: int, deterministic: bool) -> None:
    """Device, threads and kernels of this process; for every process that hosts a DeepSpeed engine."""
    torch.set_num_threads(threads)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS asks for it, before its first call
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # read by transformers; torch knows nothing of flash_attn
        torch.use_deterministic_algorithms(True)
        # A help in the search for bugs, which costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        # DeepSpeed would compile a shared-memory all-reduce here (half a minute the first time, a compiler needed)
        # which leaves 66 MiB a rank in /dev/shm after every run. Gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over the ranks; unchanged where there is no process group."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_max(value: float, device: torch.device) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def reduce_means(sums: Mapping[str, tuple[float, float]], device: torch.device) -> dict[str, float]:
    """Means over all ranks from each rank's (sum, count); a name with count 0 everywhere gives NaN.

    Every rank must pass the same names.
    """
    names = sorted(sums)
    flat = torch.tensor([sums[n] for n in names], dtype=torch.float64, device=device).reshape(-1, 2)
    total = all_reduce_sum(flat).tolist()
    return {n: s / c if c else float("nan") for n, (s, c) in zip(names, total, strict=True)}
