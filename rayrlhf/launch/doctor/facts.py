"""What is measured; the checks know nothing else. Sizes in GiB, times in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["GPU", "Clock", "Inputs", "Machine", "Node", "Place", "Published", "Reduced", "Started", "Storage", "Wanted"]


@dataclass(frozen=True, slots=True)
class Node:
    """A node as Ray knows it."""

    name: str
    """its address; with the start of its id where several have the same one"""
    id: str
    address: str
    cpus: float = 0.0
    gpus: float = 0.0
    """that Ray was told of"""
    object_store_gib: float = 0.0
    here: bool = False
    """the command runs on it"""


@dataclass(frozen=True, slots=True)
class GPU:
    name: str
    memory_gib: float
    driver: str


@dataclass(frozen=True, slots=True)
class Machine:
    versions: Mapping[str, str | None]
    """by the names in supported.toml; None: not installed"""
    twins: tuple[str, ...] = ()
    """distributions that own the same module"""
    gpus: tuple[GPU, ...] = ()
    """as the driver lists them"""
    cores: int = 0
    """that a process may run on"""
    torch_problem: str = ""
    """why torch cannot use them; empty where it can, or where there are none"""
    shm_total_gib: float = 0.0
    shm_free_gib: float = 0.0
    open_files: int | None = None
    """soft limits; None: no limit"""
    processes: int | None = None
    locked_memory_gib: float | None = None
    infiniband: bool = False


@dataclass(frozen=True, slots=True)
class Storage:
    """Of the folder that runs go to, or the nearest one above it that exists."""

    folder: str
    problem: str = ""
    """why no file could be written there"""
    free_gib: float = 0.0
    write_mib_per_s: float = 0.0
    """flushed to the disk"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one model or hub dataset was found."""

    key: str
    """in the config"""
    name: str
    where: str = ""
    """folder, cache or hub"""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Inputs:
    models: tuple[Place, ...] = ()
    data: tuple[Place, ...] = ()
    data_problem: str = ""
    """about files, in the words of the reader"""


@dataclass(frozen=True, slots=True)
class Clock:
    ahead_s: float
    """of the clock here"""
    uncertain_s: float
    """half the round trip"""


@dataclass(frozen=True, slots=True)
class Reduced:
    gib_per_s: float
    """bytes of the buffer over the time of one all-reduce"""
    right: bool
    """the sum is"""


@dataclass(frozen=True, slots=True)
class Started:
    """The toy engine."""

    seconds: float
    device: str
    problem: str = ""
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Published:
    """The toy publish, and what was sampled from it."""

    seconds: float = 0.0
    parameters_mib: float = 0.0
    probed: int = 0
    sampled: int = 0
    """tokens"""
    problem: str = ""
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the config asks of every node; paths are absolute. All plain, so that it can be sent."""

    output: str
    models: Mapping[str, str] = field(default_factory=dict)
    """key -> folder or Hugging Face name"""
    data: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """key -> sources"""
    data_root: str = ""
