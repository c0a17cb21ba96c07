"""What every actor can do: write its noise to a file, say where it listens, say how much memory it holds."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray

__all__ = [
    "SHOW_STACK",
    "Actor",
    "Whereabouts",
    "free_address",
    "leaves_data",
    "meeting_place",
    "peak_memory_gib",
    "segments_of",
    "send_output_to",
    "show_stack_when_asked",
    "use_rays_network",
    "whereabouts",
]

# A process that gets this signal writes the stacks of its threads to its log.
SHOW_STACK = signal.SIGUSR2
# What vLLM makes for the shards of an engine. Our own are looked after by whoever makes the next (`weights`).
SEGMENTS = ("/dev/shm/psm_", "/dev/shm/sem.mp-", "/dev/shm/vllm_")

Method = TypeVar("Method", bound=Callable[..., Any])


def leaves_data(method: Method) -> Method:
    """For methods that return two things: what the driver reads, and what stays in the object store.

    The driver gets a handle of the second and owns it, so it outlives the actor that made it.
    """
    marked: Method = ray.method(num_returns=2)(method)
    return marked


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where an actor's process is, for those who look after it from outside."""

    node: str
    """Ray's id of it"""
    pid: int
    started: float
    """a process number is given to others in time"""
    log: str
    segments: tuple[str, ...] = ()
    """of shared memory that it and its children hold: a process that is killed leaves them behind"""


class Actor:
    """Base of the Ray actors. Constructors return at once; the heavy part is `start`, so all ranks load together."""

    def __init__(self, log: str) -> None:
        self._log = log
        send_output_to(Path(log))
        show_stack_when_asked()

    def close(self) -> None:
        """Give back what is held outside this process's memory; nothing, unless a role says otherwise."""

    def whereabouts(self) -> Whereabouts:
        return whereabouts(self._log)

    def node(self) -> str:
        """Ray's id of the node this process runs on."""
        return this_node()

    def free_address(self) -> tuple[str, int]:
        return free_address()

    def meeting_place(self) -> tuple[str, int]:
        return meeting_place()

    def memory_gib(self) -> float:
        """Resident memory of this process, with the GPU memory it allocated."""
        import torch

        gpu = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        return float(psutil.Process().memory_info().rss + gpu) / 2**30


def free_address() -> tuple[str, int]:
    """This node's address and a free port on it."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return ray.util.get_node_ip_address(), port


def meeting_place() -> tuple[str, int]:
    """Where the others of a process group find this process, its rank 0, which listens there from now on."""
    from rayrlhf.engines.distributed import listen

    return listen(ray.util.get_node_ip_address())


def this_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def whereabouts(log: str) -> Whereabouts:
    """Of this process."""
    process = psutil.Process()
    held = {path for one in [process, *process.children(recursive=True)] for path in segments_of(one.pid)}
    return Whereabouts(this_node(), os.getpid(), process.create_time(), log, tuple(sorted(held)))


def segments_of(pid: int) -> set[str]:
    """The files in /dev/shm that a process has mapped and that are vLLM's."""
    with suppress(OSError):  # it has ended
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
        return {place for line in maps.splitlines() if (place := line[line.find("/") :]).startswith(SEGMENTS)}
    return set()


def show_stack_when_asked() -> None:
    """In the log, where this process's output goes."""
    faulthandler.register(SHOW_STACK, all_threads=True)


def use_rays_network() -> None:
    """Let process groups of this process talk over the interface that Ray found, whatever the host's name says."""
    address = ray.util.get_node_ip_address()
    for interface, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
            os.environ.setdefault("VLLM_HOST_IP", address)


def peak_memory_gib() -> float:
    """The most that this process has held so far: resident, and allocated on its GPU."""
    import torch

    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(kibibytes / 2**20 + gpu / 2**30)


def send_output_to(path: Path) -> None:
    """Everything this process prints, C libraries and children included, goes to `path`: the console is the user's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
