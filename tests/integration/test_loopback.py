"""Whoever listens while a run goes on: on this machine alone, by default."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.faults import started
from tests.integration.conftest import TINY

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def test_no_process_of_a_run_listens_on_another_network(tmp_path: Path) -> None:
    """Two data-parallel workers in the supervised stages, then PPO's roles: all look for each other."""
    ranks = ("cluster.train.ranks=2", "cluster.train.threads=1", "tracking.wandb=off", "tracking.ray_metrics=false")
    command = ["run", "configs/tiny.yaml", f"run.output={tmp_path}", *TINY, *ranks, "ppo.steps=4"]
    here, elsewhere = set[str](), set[str]()
    with started([*command, "run.stages=[pretrain,sft,collect,reward,ppo]"], tmp_path / "log") as process:
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess, IndexError):
                        name = one.cmdline()[0].partition(".")[0]
                        for connection in one.net_connections("inet"):
                            if connection.status == psutil.CONN_LISTEN:
                                home = connection.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1", "::1")
                                (here if home else elsewhere).add(name)
            time.sleep(0.2)
    assert process.returncode == 0, (tmp_path / "log").read_text()[-2000:]
    assert elsewhere == set()
    assert {"ray::RayTrainWorker", "ray::PolicyActor", "ray::RolloutActor"} <= here, "or nothing was looked at"
