"""Joining Ray leaves the process as it was."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from rayrlhf.actors import cluster
from rayrlhf.config import Config


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
