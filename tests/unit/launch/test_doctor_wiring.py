"""Every branch of the checks between nodes and of the toy publish, and how answers become one finding."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.launch.doctor import wiring
from rayrlhf.launch.doctor.facts import Node, Published, Reduced, Started
from rayrlhf.launch.doctor.findings import Answers, Finding, Verdict, over_nodes


def said(finding: Finding, status: str, found: str, cure: str = "") -> None:
    assert finding.status == status, finding
    assert found in finding.found
    assert cure in finding.cure
    assert bool(finding.cure) == (status in ("warn", "fail"))


def test_ports_that_all_reach_pass() -> None:
    said(wiring.check_ports(Answers({"a": {}, "b": {}})), "pass", "all 2 nodes: reaches a free port on every node")


def test_a_port_that_is_not_reached_fails_with_both_ends() -> None:
    answers = Answers({"a": {}, "b": {"a": "10.0.0.1:4000: timed out"}})
    said(wiring.check_ports(answers), "fail", "b: cannot reach a (10.0.0.1:4000: timed out)", "let TCP through")


def test_an_all_reduce_is_worth_its_slowest_rank() -> None:
    finding = wiring.check_gloo(Answers({"a": Reduced(1.5, True), "b": Reduced(1.25, True)}), 2)
    said(finding, "pass", "all-reduce of 16 MiB over 2 nodes: 1.2 GiB/s")
    assert finding.figures == {"gib_per_s": 1.25}


def test_one_node_sums_between_two_processes() -> None:
    finding = wiring.check_gloo(Answers({"a #0": Reduced(2.0, True), "a #1": Reduced(2.0, True)}), 1)
    said(finding, "pass", "over two processes of one node")


def test_a_slow_network_warns() -> None:
    said(wiring.check_gloo(Answers({"a": Reduced(0.05, True)}), 2), "warn", "0.05 GiB/s", "interface")
    said(wiring.check_nccl(Answers({"a": Reduced(0.5, True)}), 2), "warn", "0.5 GiB/s", "NCCL_DEBUG")


def test_a_wrong_sum_fails() -> None:
    answers = Answers({"a": Reduced(2.0, True), "b": Reduced(2.0, False)})
    said(wiring.check_gloo(answers, 2), "fail", "b: the sum is wrong", "arrives altered")


def test_a_rank_that_does_not_meet_the_others_fails_by_name() -> None:
    answers: Answers[Any] = Answers({}, {"b": "RuntimeError: connect: no route to host"})
    said(wiring.check_nccl(answers, 2), "fail", "no route to host", "let TCP through")


@pytest.mark.parametrize(("gpus", "why"), [((0, 0), "no node has a GPU"), ((1, 0), "one GPU"), ((1, 1), "")])
def test_nccl_needs_two_gpus(gpus: tuple[int, int], why: str) -> None:
    reason = wiring.why_no_nccl([Node(str(i), "", "", gpus=n) for i, n in enumerate(gpus)])
    assert reason.startswith(why)
    assert bool(reason) == bool(why)


def test_an_engine_that_starts_passes_and_one_that_does_not_says_where_it_tells_more() -> None:
    said(wiring.check_engine(Started(12.34, "cpu")), "pass", "started in 12.3 s on cpu")
    said(wiring.check_engine(Started(0.0, "cpu", "on a: the actor died", "see the logs")), "fail", "died", "the logs")


def test_a_publish_passes_only_if_it_is_verified_and_sampled_from() -> None:
    said(
        wiring.check_publish(Published(0.25, 0.5, 64, 32)), "pass", "0.5 MiB verified in 0.25 s (64 log-probs), then 32"
    )
    said(wiring.check_publish(Published(0.25, 0.5, 64, 0)), "fail", "nothing was sampled")
    said(
        wiring.check_publish(Published(problem="bucket 0 arrived altered", cure="see")),
        "fail",
        "arrived altered",
        "see",
    )


def judged(verdicts: dict[str, Verdict], failed: dict[str, str] | None = None) -> Finding:
    return over_nodes("x", Answers({name: name for name in verdicts}, failed or {}), lambda name, _: verdicts[name])


def test_the_worst_verdict_counts_and_brings_its_own_cure() -> None:
    verdicts = {
        "a": Verdict("warn", "slow", "faster"),
        "b": Verdict("fail", "broken", "mend"),
        "c": Verdict("pass", "ok"),
    }
    assert judged(verdicts) == Finding("x", "fail", "a: slow; b: broken", "mend")


def test_nodes_of_which_the_same_is_to_be_said_are_told_together() -> None:
    verdicts = {name: Verdict("warn", "slow", "faster") for name in "ab"} | {"c": Verdict("pass", "ok")}
    assert judged(verdicts) == Finding("x", "warn", "a, b: slow", "faster")
    assert judged({name: Verdict("pass", "ok") for name in "abc"}).found == "all 3 nodes: ok"
    assert judged({"a": Verdict("pass", "ok")}).found == "ok"


def test_one_node_of_one_that_does_not_answer_is_still_named() -> None:
    assert judged({}, {"a": "no answer within 5 s"}).found == "a: no answer within 5 s"


def test_hundreds_of_nodes_do_not_fill_the_screen() -> None:
    many = {f"n{i}": Verdict("fail", "broken", "mend") for i in range(100)}
    assert judged(many | {"m": Verdict("pass", "ok")}).found == "n0, n1, n2, n3, n4, n5, n6, n7 and 92 more: broken"
    each = {f"n{i}": Verdict("fail", f"broken {i}", "mend") for i in range(100)}
    assert judged(each).found.endswith("n7: broken 7; and 92 more")
