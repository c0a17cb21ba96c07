"""`rayrlhf doctor` on a real Ray of two nodes, and on this machine alone with a checkpoint path that takes no file."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import rayrlhf, shared_memory

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

RAY = str(Path(sys.executable).with_name("ray"))
OPEN = {"RAY_AUTH_MODE": "disabled"}
SECRETS = {"HF_TOKEN": "hf_dontShowMe", "WANDB_API_KEY": "dontShowMeEither"}


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[str]:
    """The address of a Ray of two nodes, which this machine has both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    # Ray's sockets lie in it, whose paths may not be long.
    scratch = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    nodes = []
    try:
        head = ["--head", f"--port={address.split(':')[1]}", "--include-dashboard=false", f"--temp-dir={scratch}"]
        nodes.append(start_node(tmp_path / "head.log", *head))
        wait_for(address, 1)
        nodes.append(start_node(tmp_path / "worker.log", f"--address={address}"))
        wait_for(address, 2)
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                node.kill()
        shutil.rmtree(scratch, ignore_errors=True)


def start_node(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    # Two nodes of one machine would otherwise take the same ports.
    ports = ("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0")
    sizes = ("--num-cpus=4", "--object-store-memory=200000000", "--node-ip-address=127.0.0.1", "--disable-usage-stats")
    with log.open("wb") as file:
        return subprocess.Popen(
            [RAY, "start", "--block", *arguments, *sizes, *ports], env={**os.environ, **OPEN}, stdout=file, stderr=file
        )


def wait_for(address: str, nodes: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        said = subprocess.run(
            [RAY, "status", f"--address={address}"],
            env={**os.environ, **OPEN},
            capture_output=True,
            text=True,
            check=False,
        )
        if said.stdout.count("node_") >= nodes:
            return
        time.sleep(0.5)
    raise AssertionError(f"Ray has not {nodes} nodes after a minute: {said.stdout}{said.stderr}")


def test_a_cluster_that_is_well_is_measured_from_end_to_end(two_nodes: str, tmp_path: Path) -> None:
    before, folders = shared_memory(), set(Path(tempfile.gettempdir()).glob("rayrlhf-doctor-*"))
    arguments = ["configs/tiny.yaml", f"run.output={tmp_path}", "--address", two_nodes, "--json"]
    done = rayrlhf("doctor", *arguments, timeout=240, **OPEN, **SECRETS)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"]
    assert checks["nodes"]["figures"] == {"nodes": 2}
    # What this machine's own disk and limits are worth is not ours to say.
    well = ("Ray", "nodes", "versions", "resources", "shared files", "clock", "ports", "vLLM", "publish")
    assert {name: checks[name]["status"] for name in well} == dict.fromkeys(well, "pass")
    assert "over 2 nodes" in checks["gloo"]["found"]
    assert checks["gloo"]["figures"]["gib_per_s"] > 0
    assert checks["checkpoint path"]["figures"]["write_mib_per_s"] > 0
    assert "64 log-probs" in checks["publish"]["found"]
    assert {name for name, check in checks.items() if check["status"] == "skipped"} == {"GPUs", "model", "data", "NCCL"}
    assert "dontShowMe" not in done.stdout + done.stderr
    assert not set(Path(tempfile.gettempdir()).glob("rayrlhf-doctor-*")) - folders, "it leaves nothing behind"
    assert not {name for name in shared_memory() - before if name.startswith("rayrlhf")}
    assert not list(tmp_path.glob(".rayrlhf-doctor-*"))


def test_a_checkpoint_path_that_takes_no_file_fails_with_the_cure_and_exit_code_1() -> None:
    """A Ray of its own, on this machine. In /proc nobody can make a file, root neither."""
    done = rayrlhf("doctor", "configs/tiny.yaml", "run.output=/proc/rayrlhf", "--quick", timeout=120, COLUMNS="160")
    assert done.returncode == 1, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if "│ fail" in line]
    assert len(rows) == 1
    assert "checkpoint path" in rows[0]
    assert "/proc: No such file or directory" in rows[0]
    assert "→ name a folder in run.output that every node can write to" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("a run would fail here: ")
    assert "Traceback" not in done.stderr
