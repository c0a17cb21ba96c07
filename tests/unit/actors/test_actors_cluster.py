"""Joining Ray leaves the process as it was."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from rayrlhf.actors import cluster
from rayrlhf.config import Config
from rayrlhf.errors import ResourceError


def test_joining_ray_leaves_the_processs_own_sigterm_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's would exit with 15."""

    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)

    def ours(*_: object) -> None: ...

    monkeypatch.setattr(cluster.ray, "init", init)
    before = signal.signal(signal.SIGTERM, ours)
    try:
        cluster._ray_init(None, "tests", cpus=1)
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("address", "in_a_job", "expected"),
    [
        (None, False, "local"),
        (None, True, "10.0.0.1:6379"),
        ("auto", False, "auto"),
        ("10.0.0.2:6379", True, "10.0.0.2:6379"),
    ],
)
def test_no_address_means_the_jobs_cluster_in_a_job_and_a_ray_of_its_own_elsewhere(
    monkeypatch: pytest.MonkeyPatch, address: str | None, in_a_job: bool, expected: str
) -> None:
    """RAY_ADDRESS alone may name the dashboard of a cluster that jobs are sent to."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(cluster.ray, "init", lambda **settings: asked.update(settings))
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 64.0}}])
    monkeypatch.setattr(cluster, "_knock", lambda address: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.delenv(cluster.JOB_VARIABLE, raising=False)
    if in_a_job:
        monkeypatch.setenv(cluster.JOB_VARIABLE, "{}")
    tree = {"model": {"path": "org/name"}, "world": {"name": "instructions"}, "cluster": {"address": address}}
    cluster.connect(Config.model_validate(tree))
    assert asked["address"] == expected
    assert (asked["num_cpus"] is None) == (expected != "local")


# What is said where a cluster cannot be joined.


@contextmanager
def server(answer: bytes) -> Iterator[str]:
    """Its address. It says the same to whoever comes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:  # closed
                    return
                with connection:
                    connection.recv(100)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def not_joined(monkeypatch: pytest.MonkeyPatch, address: str | None, error: Exception | None = None) -> ResourceError:
    def init(**_: Any) -> None:
        assert error, "Ray was asked"
        raise error

    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(ResourceError) as raised:
        cluster.join(address, "tests")
    return raised.value


def test_a_dashboards_address_is_told_from_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(b"HTTP/1.0 401 Unauthorized\r\n\r\n") as address:
        for given in (address, f"http://{address}", "https://head:8265"):
            error = not_joined(monkeypatch, given)
            assert (
                error.message
                == f"cluster.address {given}: not where Ray's nodes meet; a dashboard is at such an address"
            )
            assert "HEAD:6379" in error.hint


def test_whoever_answers_in_another_way_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(b"\0\0\x18\4\0\0\0") as address:
        error = not_joined(monkeypatch, address, ConnectionError("Failed to connect to Ray cluster"))
    assert error.message == f"cluster.address {address}: no Ray cluster answers (Failed to connect to Ray cluster)"
    assert "6379" in error.hint


def test_a_refused_token_is_named_and_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own error says that it could not connect; its cause's text says why."""
    error = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    error.__cause__ = RuntimeError(
        "Last connection error: Traceback\n  RPC error: InvalidAuthToken: Authentication token"
    )
    monkeypatch.setattr(cluster, "_knock", lambda _: None)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    said = not_joined(monkeypatch, "10.0.0.1:6379", error)
    assert said.message == "cluster.address 10.0.0.1:6379: the authentication token is missing or incorrect"
    assert (
        said.hint == "the token here is that of RAY_AUTH_TOKEN: it has to be the one that the cluster was started with"
    )
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert "set RAY_AUTH_MODE=token" in not_joined(monkeypatch, "10.0.0.1:6379", error).hint


@pytest.mark.parametrize(
    ("address", "place"), [("10.0.0.1:6379", "cluster.address 10.0.0.1:6379"), (None, "Ray cannot start here")]
)
def test_a_token_that_is_asked_for_and_not_there_is_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str | None, place: str
) -> None:
    monkeypatch.setattr(cluster, "_knock", lambda _: None)
    monkeypatch.setattr(cluster, "_stay_on_loopback", lambda: None)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    error = AuthenticationError("Token authentication is enabled but no authentication token was found. Ensure that")
    said = not_joined(monkeypatch, address, error)
    assert said.message == f"{place}: Token authentication is enabled but no authentication token was found"
    assert "there is none here: give the cluster's in RAY_AUTH_TOKEN" in said.hint
