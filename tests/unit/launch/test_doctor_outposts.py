"""Processes of ours on nodes, with a stand-in for Ray: one that does not answer costs its own line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from rayrlhf.launch.doctor import asking, outposts
from rayrlhf.launch.doctor.facts import Node, Reduced
from rayrlhf.launch.doctor.outposts import Outposts, all_reduce

A, B, C = (Node(name, name * 56, name, gpus=8) for name in "abc")


class Ref:
    def __init__(self, node: str, method: str, call: Callable[[], Any]) -> None:
        self.node, self.method, self.call = node, method, call


class FakeRay:
    """Calls run in this process when they are fetched; those that `hang` names never end."""

    def __init__(self) -> None:
        self.hang: set[tuple[str, str]] = set()
        self.answers: dict[str, Callable[..., Any]] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.options: list[dict[str, Any]] = []
        self.killed: list[str] = []
        self.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")

    def remote(self, cls: type) -> Any:
        def start(**options: Any) -> Any:
            self.options.append(options)
            name = options["scheduling_strategy"].node_id[0]
            return SimpleNamespace(remote=lambda: Actor(self, name, cls()))

        return SimpleNamespace(options=start)

    def wait(self, refs: Sequence[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        ready = [ref for ref in refs if (ref.node, ref.method) not in self.hang]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: Ref, timeout: float) -> Any:
        if (ref.node, ref.method) in self.hang:
            raise GetTimeoutError
        return ref.call()

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor.node)
        raise ValueError("gone already")  # which is no reason to stop


class Actor:
    def __init__(self, ray: FakeRay, node: str, one: Any) -> None:
        self.ray, self.node, self.one = ray, node, one

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Ref:
            self.ray.asked.append((self.node, method, *arguments))
            answer = self.ray.answers.get(method)
            return Ref(
                self.node, method, lambda: answer(self.node) if answer else getattr(self.one, method)(*arguments)
            )

        return SimpleNamespace(remote=remote)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(outposts, "ray", fake)
    monkeypatch.setattr(asking, "ray", fake)
    return fake


def methods(ray: FakeRay, node: str) -> Iterable[str]:
    return {method for asked, method, *_ in ray.asked if asked == node}


def test_outposts_that_all_answer_tell_clocks_and_ports_and_end(ray: FakeRay) -> None:
    posts = Outposts([A, B])
    clocks, ports = posts.clocks(), posts.ports()
    assert clocks.failed == ports.failed == {}
    assert ports.given == {"a": {}, "b": {}}
    assert all(abs(clock.ahead_s) < 1 for clock in clocks.given.values())
    posts.close()
    assert sorted(ray.killed) == ["a", "b"]


def test_one_that_does_not_start_is_ended_asked_no_more_and_named_in_every_answer(ray: FakeRay) -> None:
    ray.hang = {("b", "now")}
    posts = Outposts([A, B])
    assert ray.killed == ["b"]
    failed = {"b": "no answer within 60 s"}
    assert posts.clocks().failed == posts.ports().failed == failed
    assert methods(ray, "b") == {"now"}
    assert set(posts.clocks().given) == set(posts.ports().given) == {"a"}


def test_one_that_hangs_later_has_no_clock_and_the_others_have(ray: FakeRay) -> None:
    posts = Outposts([A, B])
    ray.hang = {("a", "now")}
    clocks = posts.clocks()
    assert (clocks.failed, set(clocks.given)) == ({"a": "no answer within 20 s"}, {"b"})


def test_one_that_opens_no_port_is_not_knocked_at_and_one_that_does_not_knock_is_named(ray: FakeRay) -> None:
    posts = Outposts([A, B, C])
    ray.hang = {("a", "listen"), ("b", "reach")}
    ports = posts.ports()
    # Two doors of five seconds at most.
    assert ports.failed == {"a": "no answer within 20 s", "b": "no answer within 30 s"}
    assert ports.given == {"c": {}}
    [doors] = [arguments[0] for node, method, *arguments in ray.asked if (node, method) == ("c", "reach")]
    assert set(doors) == {"b", "c"}


# All-reduces.


def reduced(ray: FakeRay, backend: str, nodes: list[Node]) -> tuple[Mapping[str, Reduced], Mapping[str, str]]:
    ray.answers = {"meeting_place": lambda node: (f"10.0.0.{node}", 5000), "all_reduce": lambda _: Reduced(1.0, True)}
    answers = all_reduce(backend, nodes)
    return answers.given, answers.failed


def test_all_members_meet_at_the_first_ones_place(ray: FakeRay) -> None:
    given, failed = reduced(ray, "nccl", [A, B])
    assert (set(given), failed) == ({"a", "b"}, {})
    calls = [call for call in ray.asked if call[1] == "all_reduce"]
    assert calls == [(node, "all_reduce", "nccl", rank, 2, ("10.0.0.a", 5000)) for rank, node in enumerate("ab")]
    assert [options["num_gpus"] for options in ray.options] == [1.0, 1.0]
    assert sorted(ray.killed) == ["a", "b"]


def test_a_node_that_is_alone_has_two_members_and_gloo_takes_no_gpu(ray: FakeRay) -> None:
    given, _ = reduced(ray, "gloo", [A, A])
    assert set(given) == {"a #0", "a #1"}
    assert [options["num_gpus"] for options in ray.options] == [0.0, 0.0]


def test_where_a_member_is_not_ready_nobody_waits_for_it_in_a_group(ray: FakeRay) -> None:
    ray.hang = {("b", "meeting_place")}
    given, failed = reduced(ray, "gloo", [A, B])
    assert (given, failed) == ({}, {"b": "no answer within 60 s"})
    assert "all_reduce" not in {method for _, method, *_ in ray.asked}
    assert sorted(ray.killed) == ["a", "b"]


def test_a_member_that_never_comes_out_of_the_group_is_named(ray: FakeRay) -> None:
    ray.hang = {("b", "all_reduce")}
    given, failed = reduced(ray, "gloo", [A, B])
    assert (set(given), failed) == ({"a"}, {"b": "no answer within 120 s"})
