"""Joining Ray leaves the process as it was."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from rayrlhf.actors import cluster


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
