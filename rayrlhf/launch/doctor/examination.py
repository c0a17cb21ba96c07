"""What is asked of whom, in which order; what that is worth the checks say.

join Ray ─► every node: machine ─► storage, inputs, a file ─► outposts: clock, ports ─► gloo, NCCL ─► the toy publish
                 │
                 └ one that does not answer is told, and left out of all that follows
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray

from rayrlhf.actors.cluster import disconnect, join, resources_of_nodes
from rayrlhf.actors.placement import check_resources, promised_cpus
from rayrlhf.config import Config
from rayrlhf.config.secrets import masked
from rayrlhf.errors import ResourceError
from rayrlhf.launch.doctor import checks, probes, wiring
from rayrlhf.launch.doctor.asking import ask, list_nodes, named
from rayrlhf.launch.doctor.facts import Inputs, Machine, Node, Storage, Wanted
from rayrlhf.launch.doctor.findings import Answers, Finding, skipped
from rayrlhf.launch.doctor.outposts import Outposts, all_reduce
from rayrlhf.launch.doctor.wanted import checkpoints_gib, wanted, why_no_data, why_no_models

__all__ = ["NAMES", "examine"]

# In the order of the report.
NAMES = (
    *("Ray", "nodes", "versions", "resources", "GPUs", "shared memory", "limits", "checkpoint path", "shared files"),
    *("model", "data", "clock", "ports", "gloo", "NCCL", "vLLM", "publish"),
)
# A worker of Ray's has to start on a busy node first.
MACHINE_S, STORAGE_S, INPUTS_S, SEEN_S = 90.0, 120.0, 90.0, 30.0
NO_CONFIG = "no CONFIG was given"
QUICK = "left out by --quick"


def examine(config: Config | None, address: str | None, quick: bool, doing: Callable[[str], None]) -> list[Finding]:
    """Every check, in the order of `NAMES`; none raises.

    Args:
        address: of the Ray to join; None: that of the config, and without one, a Ray of this machine alone.
        quick: leave out what takes its time: all-reduces, and the toy publish.
        doing: is told what is being measured.
    """
    address = address or (config.cluster.address if config else None)
    doing("joining Ray" if address else "starting Ray")
    # Errors of others are among what is found.
    return [replace(f, found=masked(f.found), cure=masked(f.cure)) for f in _examine(config, address, quick, doing)]


def _examine(config: Config | None, address: str | None, quick: bool, doing: Callable[[str], None]) -> list[Finding]:
    try:
        join(address, f"rayrlhf-doctor-{os.getpid()}", _cpus(config))
    except Exception as error:  # another version of Ray or Python there, a refused token, ...
        return [_no_ray(error), *(skipped(name, "there is no Ray to ask") for name in NAMES[1:])]
    try:
        return Examination(config, address, quick, doing).findings()
    finally:
        disconnect()


def _cpus(config: Config | None) -> int:
    return int(-(-promised_cpus(config) // 1)) if config else 1


def _no_ray(error: Exception) -> Finding:
    if isinstance(error, ResourceError):
        return Finding("Ray", "fail", error.message, error.hint)
    cure = "the cluster's Ray and Python must be those installed here, and RAY_AUTH_MODE and its token those it expects"
    return Finding("Ray", "fail", named(error), cure)


class Examination:
    """Of the Ray that this process has joined."""

    def __init__(self, config: Config | None, address: str | None, quick: bool, doing: Callable[[str], None]) -> None:
        self._config = config
        self._address = address
        self._quick = quick
        self._doing = doing
        self._wanted = wanted(config) if config else Wanted("")
        self._every = list_nodes(ray.nodes(), ray.get_runtime_context().get_node_id())
        self._named = {node.name: node for node in self._every}

    def findings(self) -> list[Finding]:
        self._doing("asking every node what it has")
        machines: Answers[Machine] = ask(self._every, probes.measure_machine, timeout_s=MACHINE_S)
        nodes = [node for node in self._every if node.name in machines.given]
        found = [self._ray(), *self._machines(machines)]
        if not nodes:
            return [*found, *(skipped(name, "no node answers") for name in NAMES[len(found) :])]
        found += self._files(nodes)
        found += self._wires(nodes)
        found += self._toy(nodes, machines)
        return found

    def _ray(self) -> Finding:
        where = f"joined {self._address}" if self._address else "one of its own, on this machine"
        return Finding("Ray", "pass", f"{ray.__version__}, {where}")

    def _machines(self, machines: Answers[Machine]) -> list[Finding]:
        config = self._config
        device = config.cluster.device if config else None
        bucket = config.weights.bucket_mib / 1024 if config else None
        return [
            checks.check_nodes(machines, self._named),
            checks.check_versions(machines),
            self._resources(),
            checks.check_gpus(machines, self._named, device),
            checks.check_shared_memory(machines, self._named, bucket),
            checks.check_limits(machines),
        ]

    def _resources(self) -> Finding:
        """What the config's roles ask for at once, as a run checks it."""
        if self._config is None:
            return skipped("resources", NO_CONFIG)
        try:
            check_resources(self._config, resources_of_nodes())
        except ResourceError as error:
            return Finding("resources", "fail", error.message, error.hint)
        return Finding("resources", "pass", "the cluster has what the config's roles ask for")

    def _files(self, nodes: Sequence[Node]) -> list[Finding]:
        if self._config is None:
            return [skipped(name, NO_CONFIG) for name in ("checkpoint path", "shared files", "model", "data")]
        self._doing("writing to the checkpoint path")
        storage: Answers[Storage] = ask(nodes, probes.measure_storage, self._wanted.output, timeout_s=STORAGE_S)
        shared = self._shared_files(nodes)
        self._doing("looking for models and data")
        inputs: Answers[Inputs] = ask(nodes, probes.measure_inputs, self._wanted, timeout_s=INPUTS_S)
        return [
            checks.check_storage(storage, checkpoints_gib(self._config)),
            shared,
            checks.check_models(inputs, why_no_models(self._config)),
            checks.check_data(inputs, self._named, why_no_data(self._config)),
        ]

    def _shared_files(self, nodes: Sequence[Node]) -> Finding:
        """All of it in tasks: a mount that has gone hangs whoever looks at it."""
        first, text = nodes[:1], uuid4().hex
        left: Answers[str] = ask(first, probes.leave_file, self._wanted.output, text, timeout_s=SEEN_S)
        if left.failed:
            return skipped("shared files", f"{first[0].name} can write no file: see checkpoint path")
        [path] = left.given.values()
        try:
            seen: Answers[str] = ask(nodes, probes.look_for_file, path, text, timeout_s=SEEN_S)
        finally:
            ask(first, probes.remove_file, path, timeout_s=SEEN_S)
        return checks.check_shared_files(seen, str(Path(path).parent), len(nodes))

    def _wires(self, nodes: Sequence[Node]) -> list[Finding]:
        self._doing("comparing clocks, knocking at ports")
        outposts = Outposts(nodes)
        try:
            clocks, ports = checks.check_clock(outposts.clocks()), wiring.check_ports(outposts.ports())
        finally:
            outposts.close()
        if self._quick:
            return [clocks, ports, skipped("gloo", QUICK), skipped("NCCL", QUICK)]
        self._doing("summing over gloo")
        gloo = wiring.check_gloo(all_reduce("gloo", _pair(nodes)), len(nodes))
        return [clocks, ports, gloo, self._nccl(nodes)]

    def _nccl(self, nodes: Sequence[Node]) -> Finding:
        if reason := wiring.why_no_nccl(nodes):
            return skipped("NCCL", reason)
        self._doing("summing over NCCL")
        having = [node for node in nodes if node.gpus >= 1]
        return wiring.check_nccl(all_reduce("nccl", _pair(having)), len(having))

    def _toy(self, nodes: Sequence[Node], machines: Answers[Machine]) -> list[Finding]:
        if self._quick:
            return [skipped("vLLM", QUICK), skipped("publish", QUICK)]
        from rayrlhf.launch.doctor.toy import start_and_publish

        self._doing("starting vLLM, publishing to it")
        node, device = toy_place(nodes, machines, self._config.cluster.device if self._config else None)
        started, published = start_and_publish(node, device)
        engine = wiring.check_engine(started)
        return [engine, wiring.check_publish(published) if published else skipped("publish", "vLLM did not start")]


def toy_place(nodes: Sequence[Node], machines: Answers[Machine], device: str | None) -> tuple[Node, str]:
    """On a GPU where the config says so, or without one where there is a GPU that torch can use; else here."""

    def usable(node: Node) -> bool:
        machine = machines.given[node.name]
        return node.gpus >= 1 and bool(machine.gpus) and not machine.torch_problem

    able: list[Any] = [node for node in nodes if usable(node)]
    if able and device != "cpu":
        return able[0], "cuda"
    return nodes[0], device or "cpu"


def _pair(nodes: Sequence[Node]) -> list[Node]:
    return list(nodes) if len(nodes) > 1 else [nodes[0], nodes[0]]
