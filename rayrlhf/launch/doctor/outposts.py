"""A process of ours on every node, to see what lies between them: clocks, ports, all-reduces."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from time import perf_counter
from typing import Any

import ray

from rayrlhf.actors.base import use_rays_network
from rayrlhf.launch.doctor.asking import collect, on_node
from rayrlhf.launch.doctor.facts import Clock, Node, Reduced
from rayrlhf.launch.doctor.findings import Answers

__all__ = ["Outposts", "all_reduce", "clock_of"]

READY_S, CALL_S, KNOCK_S = 60.0, 20.0, 5.0
# Importing torch on a busy node, the group's meeting, and the sums.
REDUCE_S = 120.0
PINGS, ROUNDS, NBYTES = 8, 5, 16 * 2**20

Address = tuple[str, int]


class Outpost:
    """Methods that run on a node."""

    def now(self) -> float:
        return time.time()

    def listen(self) -> Address:
        """This node's address and a port on it that takes connections from now on."""
        self._door = socket.socket()
        self._door.bind(("", 0))
        self._door.listen(1024)
        port: int = self._door.getsockname()[1]
        return ray.util.get_node_ip_address(), port

    def reach(self, doors: Mapping[str, Address]) -> dict[str, str]:
        """Those that cannot be connected to, and why."""
        unreached = {}
        for name, (host, port) in doors.items():
            try:
                socket.create_connection((host, port), timeout=KNOCK_S).close()
            except OSError as error:
                unreached[name] = f"{host}:{port}: {error.strerror or error}"
        return unreached

    def meeting_place(self) -> Address:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port: int = probe.getsockname()[1]
        return ray.util.get_node_ip_address(), port

    def all_reduce(self, backend: str, rank: int, world: int, meeting: Address) -> Reduced:
        """Sums of a buffer of `NBYTES` over all ranks, timed after a first one that opens the connections."""
        use_rays_network()
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        import torch
        import torch.distributed as dist

        dist.init_process_group(
            backend,
            init_method=f"tcp://{meeting[0]}:{meeting[1]}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=REDUCE_S / 2),
        )
        try:
            device = "cuda" if backend == "nccl" else "cpu"
            buffer, seconds, right = torch.empty(NBYTES // 4, device=device), [], True
            for _ in range(ROUNDS + 1):
                buffer.fill_(rank + 1.0)
                dist.barrier()
                start = perf_counter()
                dist.all_reduce(buffer)
                if backend == "nccl":
                    torch.cuda.synchronize()
                seconds.append(perf_counter() - start)
                right = right and bool((buffer == world * (world + 1) / 2).all())
            # The fastest one: what the network can do, whatever else the nodes do meanwhile.
            return Reduced(NBYTES / 2**30 / min(seconds[1:]), right)
        finally:
            dist.destroy_process_group()


class Outposts:
    """One on each node; those that did not start are missing from every answer, with the reason."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._actors = {node.name: ray.remote(Outpost).options(**on_node(node)).remote() for node in nodes}
        started = collect({name: actor.now.remote() for name, actor in self._actors.items()}, READY_S)
        self.failed: Mapping[str, str] = started.failed
        for name in started.failed:
            _end(self._actors.pop(name))

    def clocks(self) -> Answers[Clock]:
        """Node by node: two that answer at once would wait for each other."""
        given, failed = {}, dict(self.failed)
        for name, actor in self._actors.items():
            pings = []
            with suppress(Exception):
                for _ in range(PINGS):
                    sent = time.time()
                    there = ray.get(actor.now.remote(), timeout=CALL_S)
                    pings.append((sent, there, time.time()))
            if pings:
                given[name] = clock_of(pings)
            else:
                failed[name] = f"no answer within {CALL_S:g} s"
        return Answers(given, failed)

    def ports(self) -> Answers[Mapping[str, str]]:
        doors = collect({name: actor.listen.remote() for name, actor in self._actors.items()}, CALL_S)
        asked = {name: self._actors[name].reach.remote(doors.given) for name in doors.given}
        reached = collect(asked, CALL_S + KNOCK_S * len(doors.given))
        return Answers(reached.given, {**self.failed, **doors.failed, **reached.failed})

    def close(self) -> None:
        for actor in self._actors.values():
            _end(actor)


def all_reduce(backend: str, nodes: Sequence[Node]) -> Answers[Reduced]:
    """Between one process on each of these nodes; a node that is named twice has two.

    Args:
        backend: gloo, or nccl, which takes a GPU for each process.
    """
    names = [node.name if nodes.count(node) == 1 else f"{node.name} #{i}" for i, node in enumerate(nodes)]
    gpus = 1.0 if backend == "nccl" else 0.0
    actors = [ray.remote(Outpost).options(**on_node(node, gpus)).remote() for node in nodes]
    try:
        ready = collect(dict(zip(names, (a.meeting_place.remote() for a in actors), strict=True)), READY_S)
        if ready.failed:  # a group needs all of them
            return Answers({}, ready.failed)
        calls = {
            name: actor.all_reduce.remote(backend, rank, len(nodes), ready.given[names[0]])
            for rank, (name, actor) in enumerate(zip(names, actors, strict=True))
        }
        answers: Answers[Reduced] = collect(calls, REDUCE_S)
        return answers
    finally:
        for actor in actors:
            _end(actor)


def clock_of(pings: Sequence[tuple[float, float, float]]) -> Clock:
    """From (sent, the time there, received): the quickest round trip says most (Cristian 1989)."""
    sent, there, received = min(pings, key=lambda ping: ping[2] - ping[0])
    return Clock(there - (sent + received) / 2, (received - sent) / 2)


def _end(actor: Any) -> None:
    with suppress(Exception):  # gone already
        ray.kill(actor)
