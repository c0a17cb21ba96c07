"""What only Ray can tell is told as clearly: one message, exit code 2, no actor."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import rayrlhf

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]


def test_a_gpu_config_on_a_machine_without_gpus_says_what_was_asked_for_and_found(tmp_path: Path) -> None:
    done = rayrlhf("run", "configs/tiny.yaml", f"run.output={tmp_path}", "cluster.device=cuda")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "ResourceError: the config asks for 5 GPUs, the cluster has 0" in done.stderr
    assert "hint: set cluster.device=cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("demo/logs/*")), "no actor was started"


def test_an_address_where_no_cluster_answers_is_named(tmp_path: Path) -> None:
    done = rayrlhf("run", "configs/tiny.yaml", f"run.output={tmp_path}", "cluster.address=127.0.0.1:1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "ResourceError: cluster.address 127.0.0.1:1: no Ray cluster answers" in done.stderr
    assert "Traceback" not in done.stderr
