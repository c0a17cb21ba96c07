"""Every node is asked at once, each answer has a deadline, and one that fails costs its own line."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrlhf.launch.doctor.facts import Node
from rayrlhf.launch.doctor.findings import Answers

__all__ = ["ask", "collect", "list_nodes", "named", "on_node"]

STORE = "object_store_memory"


def list_nodes(table: Sequence[Mapping[str, Any]], here: str) -> list[Node]:
    """The nodes that are up, this one first.

    Args:
        table: as of `ray.nodes()`.
        here: Ray's id of the node that this process runs on.
    """
    alive = [row for row in table if row["Alive"]]
    several = Counter(row["NodeManagerAddress"] for row in alive)

    def node(row: Mapping[str, Any]) -> Node:
        name, key, has = row["NodeManagerAddress"], row["NodeID"], row["Resources"]
        return Node(
            name=name if several[name] == 1 else f"{name} ({key[:6]})",
            id=key,
            address=name,
            cpus=has.get("CPU", 0.0),
            gpus=has.get("GPU", 0.0),
            object_store_gib=has.get(STORE, 0.0) / 2**30,
            here=key == here,
        )

    return sorted(map(node, alive), key=lambda node: (not node.here, node.name))


def on_node(node: Node, gpus: float = 0.0) -> dict[str, Any]:
    """Options of a task or an actor that runs there or nowhere, and takes no CPU from a run."""
    return {
        "num_cpus": 0,
        "num_gpus": gpus,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
    }


def ask(nodes: Iterable[Node], function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Answers[Any]:
    """`function(*arguments)` on every node."""
    remote = ray.remote(function)
    refs = {node.name: remote.options(**on_node(node), max_retries=0).remote(*arguments) for node in nodes}
    answers = collect(refs, timeout_s)
    for name in answers.failed:
        with suppress(Exception):  # it may have failed by itself
            ray.cancel(refs[name], force=True)
    return answers


def collect(refs: Mapping[str, Any], timeout_s: float) -> Answers[Any]:
    """What the calls give until the deadline, which they have in common."""
    deadline = time.monotonic() + timeout_s
    ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s) if refs else ([], [])
    given, failed = {}, {}
    for name, ref in refs.items():
        if ref not in ready:
            failed[name] = f"no answer within {timeout_s:g} s"
            continue
        try:
            given[name] = ray.get(ref, timeout=max(1.0, deadline - time.monotonic()))
        except Exception as error:  # whatever a node may do
            failed[name] = named(error)
    return Answers(given, failed)


def named(error: BaseException) -> str:
    """The kind of a remote error and its first line."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0].strip()[:200]}" if lines else type(cause).__name__
