"""Checks of what lies between nodes, and of the parts working together: measured -> a `Finding`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rayrlhf.launch.doctor.facts import Node, Published, Reduced, Started
from rayrlhf.launch.doctor.findings import Answers, Finding, Verdict, over_nodes, passed

__all__ = ["check_engine", "check_gloo", "check_nccl", "check_ports", "check_publish", "why_no_nccl"]

# Of one all-reduce of 16 MiB: a gigabit network, and one that is not NCCL's own.
SLOW_GLOO_GIB_PER_S, SLOW_NCCL_GIB_PER_S = 0.1, 1.0
OPEN = "let TCP through between the nodes, on all ports: Ray, torch, gloo and NCCL take free ones"


def check_ports(answers: Answers[Mapping[str, str]]) -> Finding:
    """Every node reaches a free port on every other one.

    Args:
        answers: node -> the nodes that it does not reach, with the reason.
    """

    def judge(_: str, unreached: Mapping[str, str]) -> Verdict:
        if unreached:
            found = ", ".join(f"{node} ({why})" for node, why in unreached.items())
            return Verdict("fail", f"cannot reach {found}", OPEN)
        return passed(
            "reaches a free port on every node" if len(answers.given) > 1 else "reaches a free port of its own"
        )

    return over_nodes("ports", answers, judge)


def check_gloo(answers: Answers[Reduced], nodes: int) -> Finding:
    """Sums of float32 over processes, one a node (two on a single one), through the CPU's network."""
    cure = "see which interface Ray's address belongs to, and what else keeps it and the nodes busy"
    return _check_all_reduce("gloo", answers, nodes, SLOW_GLOO_GIB_PER_S, cure)


def check_nccl(answers: Answers[Reduced], nodes: int) -> Finding:
    cure = "see NCCL_DEBUG=INFO for the network that it took; InfiniBand needs its devices in the container"
    return _check_all_reduce("NCCL", answers, nodes, SLOW_NCCL_GIB_PER_S, cure)


def why_no_nccl(nodes: Sequence[Node]) -> str:
    """Why there is no all-reduce over GPUs; empty where there can be one."""
    gpus = sum(int(node.gpus) for node in nodes)
    return "" if gpus > 1 else "one GPU: nothing to reduce with" if gpus else "no node has a GPU"


def _check_all_reduce(name: str, answers: Answers[Reduced], nodes: int, slow: float, cure: str) -> Finding:
    between = f"{nodes} nodes" if nodes > 1 else "two processes of one node"

    def judge(_: str, reduced: Reduced) -> Verdict:
        if not reduced.right:
            return Verdict("fail", "the sum is wrong", "test the node's memory and network: data arrives altered")
        return passed("")

    if answers.failed or not all(r.right for r in answers.given.values()):
        finding = over_nodes(name, answers, judge)
        return Finding(
            name, finding.status, finding.found, f"{finding.cure}; {OPEN}" if answers.failed else finding.cure
        )
    speed = min((r.gib_per_s for r in answers.given.values()), default=0.0)
    found = f"all-reduce of 16 MiB over {between}: {speed:.2g} GiB/s"
    status, figures = ("warn", cure) if speed < slow else ("pass", ""), {"gib_per_s": speed}
    return Finding(name, status[0], found, status[1], figures)  # type: ignore[arg-type]


def check_engine(started: Started) -> Finding:
    """vLLM starts with a toy model, the way that a run starts it."""
    if started.problem:
        return Finding("vLLM", "fail", started.problem, started.cure)
    return Finding(
        "vLLM", "pass", f"started in {started.seconds:.1f} s on {started.device}", "", {"s": started.seconds}
    )


def check_publish(published: Published) -> Finding:
    """A learner's toy weights reach that engine and are verified there, and it samples."""
    if published.problem:
        return Finding("publish", "fail", published.problem, published.cure)
    if not published.sampled:
        cure = "see the engine's log; `rayrlhf run configs/tiny.yaml` runs the same parts"
        return Finding("publish", "fail", "the weights were verified, and nothing was sampled from them", cure)
    found = (
        f"{published.parameters_mib:.2g} MiB verified in {published.seconds:.2f} s ({published.probed} log-probs), "
        f"then {published.sampled} tokens sampled"
    )
    return Finding("publish", "pass", found, "", {"s": published.seconds})
