"""Runs as jobs of a real cluster: a head without CPUs, a worker node with all of them, token authentication on.

The client is a process of its own that has no torch, no Ray runtime, and nothing but the head's HTTP port.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.integration.conftest import ROOT, FinishedRun
from tests.integration.hosts import RAY

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from rayrlhf.cli import main; main()"
CLIENT = [sys.executable, "-c", WITHOUT_TORCH]
TOKEN, SECRET = secrets.token_hex(32), f"hf_{secrets.token_hex(16)}"


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_for(said: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := said()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return value


class Cluster:
    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.gcs, self.port, *self.agents = free_ports(4)
        self.address = f"http://127.0.0.1:{self.port}"
        self.scratch = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))  # Ray's sockets lie in it, in short paths
        self.nodes: list[subprocess.Popen[bytes]] = []
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**plain, **auth, "PATH": path, "HF_HUB_OFFLINE": "1"}
        self.client = {**os.environ, **auth, "HF_TOKEN": SECRET, "RAY_TMPDIR": str(logs / "client")}

    def start(self) -> None:
        head = [f"--port={self.gcs}", f"--dashboard-port={self.port}", f"--temp-dir={self.scratch}", "--num-cpus=0"]
        self._start_node("head", "--head", "--include-dashboard=true", *head)
        wait_for(lambda: self._nodes() == 1, "the head", 60)
        self._start_node("worker", f"--address=127.0.0.1:{self.gcs}", "--num-cpus=8")
        wait_for(lambda: self._nodes() == 2, "the worker node", 60)

    def _start_node(self, name: str, *arguments: str) -> None:
        agent = f"--dashboard-agent-listen-port={self.agents[len(self.nodes)]}"
        command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", agent, *arguments]
        with (self.logs / f"{name}.log").open("wb") as log:
            self.nodes.append(
                subprocess.Popen(
                    [*command, "--object-store-memory=300000000"], env=self.environment, stdout=log, stderr=log
                )
            )

    def get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return requests.get(self.address + path, headers=headers, timeout=30).json()

    def _nodes(self) -> int:
        with suppress(requests.RequestException, KeyError):  # the dashboard comes a second after the rest
            return len(self.get("/nodes?view=summary")["data"]["summary"])
        return 0

    def rayrlhf(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [*CLIENT, *arguments]
        if "--address" not in arguments:
            command += ["--address", self.address]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.client | environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def end(self) -> None:
        processes = [q for node in self.nodes for q in [psutil.Process(node.pid)] if q.is_running()]
        processes += [child for process in processes for child in process.children(recursive=True)]
        for node in reversed(self.nodes):
            node.terminate()
        _, alive = psutil.wait_procs(processes, timeout=3)  # a head would drain for half a minute
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self.nodes:
            node.wait(10)
        shutil.rmtree(self.scratch, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()


class Wire:
    """A way to the cluster that can be cut."""

    def __init__(self, port: int) -> None:
        self.target, self.open, self.whole = port, set[asyncio.StreamWriter](), True
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.whole:
            writer.close()
            return
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        self.open |= {writer, back}
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer), return_exceptions=True)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        target.close()

    def _cut(self) -> None:
        self.whole = False
        for writer in self.open:
            writer.transport.abort()
        self.open.clear()

    @contextmanager
    def cut(self) -> Iterator[None]:
        self.loop.call_soon_threadsafe(self._cut)
        yield
        self.whole = True


def arguments(finished: FinishedRun, output: Path, *more: str) -> list[str]:
    models = [f"{stage}.path={finished.artifact(stage) / 'model'}" for stage in ("sft", "reward")]
    return [
        "configs/tiny.yaml",
        "run.name=job",
        f"run.output={output}",
        "run.stages=[ppo]",
        f"model={{path: {finished.artifact('sft') / 'model'}}}",
        *models,
        *[a for a in finished.arguments if a.startswith(("ppo.batch", "ppo.mini", "ppo.learn", "rollout.max"))],
        *more,
    ]


def job_of(stdout: str) -> str:
    return stdout.split()[0]


def steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_job_is_stopped_with_a_checkpoint_and_another_goes_on_while_the_line_is_cut(
    cluster: Cluster, finished: FinishedRun, tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    run = arguments(finished, tmp_path, "checkpoint.every=1000")
    first = cluster.rayrlhf("submit", *run, "ppo.steps=1000")
    assert first.returncode == 0, first.stdout + first.stderr
    job = job_of(first.stdout)
    wait_for(lambda: steps(folder), "the first step")
    drivers = [p for p in psutil.process_iter(["cmdline"]) if f"run.output={tmp_path}" in (p.info["cmdline"] or [])]
    assert [p.environ().get("HF_TOKEN") for p in drivers] == [SECRET]  # no shell beside the driver
    busy = cluster.rayrlhf("submit", *run, "--resume")
    assert busy.returncode == 2
    assert f"{job} is RUNNING and writes to {folder}" in busy.stderr
    assert not list(folder.glob("checkpoints/step-*"))

    stopped = cluster.rayrlhf("stop", job)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "has ended" in stopped.stdout
    assert "go on with --resume" in stopped.stdout
    (checkpoint,) = folder.glob("checkpoints/step-*")
    done = int(checkpoint.name.removeprefix("step-"))
    assert "STOPPED" in cluster.rayrlhf("status", job).stdout

    wire, output = Wire(cluster.port), tmp_path / "second.txt"
    command = [*CLIENT, "submit", *run, f"ppo.steps={done + 2}", "--resume", "--follow", "--address", wire.address]
    with (
        output.open("w") as log,
        subprocess.Popen(command, cwd=ROOT, env=cluster.client, stdout=log, stderr=-1) as client,
    ):
        wait_for(lambda: len(output.read_text().splitlines()) > 2, "the job's first lines")
        with wire.cut():
            time.sleep(1.5)
        _, said = client.communicate(timeout=200)
    assert client.returncode == 0, output.read_text() + said.decode()
    assert "the connection to the cluster is lost" in said.decode()
    assert "connected again" in said.decode()
    submitted, _, shown = output.read_text().partition("\n")
    assert shown == cluster.rayrlhf("logs", job_of(submitted)).stdout  # each line once, none left out
    assert steps(folder) == list(range(1, done + 3))
    assert (folder / "model").is_dir()
    for text in [output.read_text(), *(f.read_text() for f in folder.rglob("*.yaml"))]:
        assert SECRET not in text
    assert not (cluster.logs / "client").exists(), "the client started a Ray of its own"


def test_what_the_user_can_mend_ends_the_client_with_2_and_the_same_message(
    cluster: Cluster, finished: FinishedRun, tmp_path: Path
) -> None:
    run = arguments(finished, tmp_path, "reward.path=/nowhere/reward")
    done = cluster.rayrlhf("submit", *run, "--follow")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "reward.path" in done.stdout
    status = cluster.rayrlhf("status", job_of(done.stdout))
    assert "FAILED" in status.stdout
    assert "exit code  2" in status.stdout
    assert "cause" in status.stdout


def test_plain_ray_job_submit_joins_the_cluster_and_its_failure_reaches_the_client(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = ["pretrain", "configs/tiny.yaml", f"run.output={tmp_path}", "run.max_loss=1e-6", "pretrain.max_steps=2"]
    tiny = ["model.from_scratch.hidden_size=64", "model.from_scratch.heads=2", "model.from_scratch.layers=2"]
    command = [RAY, "job", "submit", "--address", cluster.address, "--working-dir", ".", "--no-wait"]
    named = [*command, "--submission-id", "plain", "--", "rayrlhf", *run, *tiny]
    done = subprocess.run(named, cwd=ROOT, env=cluster.client, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    followed = cluster.rayrlhf("logs", "plain", "--follow")
    assert followed.returncode == 1, followed.stdout + followed.stderr
    status = cluster.rayrlhf("status", "plain")
    assert "exit code  1" in status.stdout
    assert "cause      TrainingError: " in status.stdout
    assert cluster.get("/api/jobs/plain")["driver_info"] is not None  # the driver is one of this cluster's


def test_a_wrong_token_and_an_unknown_job_are_named_with_the_cure(cluster: Cluster) -> None:
    wrong = cluster.rayrlhf("status", "plain", RAY_AUTH_TOKEN="0" * 64)
    assert wrong.returncode == 2
    assert "the token here is that of RAY_AUTH_TOKEN" in wrong.stderr
    none = cluster.rayrlhf("status", "plain", RAY_AUTH_MODE="disabled")
    assert none.returncode == 2
    assert "set RAY_AUTH_MODE=token" in none.stderr
    unknown = cluster.rayrlhf("logs", "plian")
    assert unknown.returncode == 2
    assert "hint: did you mean plain?" in unknown.stderr
