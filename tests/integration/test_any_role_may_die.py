"""Each role is killed once in a running PPO; the run ends as the one that nothing happened to, bit by bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import COMMAND, ROOT, FinishedRun
from tests.integration.test_resume import arguments, end_session, learned, whole

__all__ = ["whole"]
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

# Who is killed, in the middle of which of its calls, and what it is called in the run's records.
DEATHS = [
    ("RolloutActor", "generate", "rollout-0"),
    ("RewardActor", "score", "reward"),
    ("ReferenceActor", "score", "reference"),
    ("PolicyActor", "update", "policy"),
    ("ValueActor", "update", "value"),
]


@contextmanager
def started(run: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (
        open(log, "wb") as output,
        subprocess.Popen(
            [*COMMAND, "ppo", *run], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()
            end_session(process.pid)


def actor(driver: int, name: str) -> psutil.Process | None:
    """The actor's process; Ray writes its class, and the method that it is in, where its command line was."""
    for child in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess, IndexError):
            if child.cmdline()[0].startswith(f"ray::{name}"):
                return child
    return None


def signal_within(driver: psutil.Process, name: str, method: str, how: signal.Signals) -> None:
    """Send the signal while the actor is in the method: it is read from the process itself, just before."""
    deadline = time.monotonic() + 120
    while (found := actor(driver.pid, name)) is None:
        assert time.monotonic() < deadline, f"no {name}"
        time.sleep(0.05)
    title = f"ray::{name}.{method}".encode()
    while not Path(f"/proc/{found.pid}/cmdline").read_bytes().startswith(title):
        assert time.monotonic() < deadline, f"{name} is never in {method}"
        assert driver.status() != psutil.STATUS_ZOMBIE, "the run ended before"
        time.sleep(0.001)
    os.kill(found.pid, how)


def recoveries(folder: Path) -> list[dict[str, Any]]:
    path = folder / "recoveries.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_replacement(folder: Path, who: str) -> None:
    deadline = time.monotonic() + 120
    while not any(r["who"] == who and r["event"] == "replaced" for r in recoveries(folder)):
        assert time.monotonic() < deadline, f"{who} is not replaced: {recoveries(folder)}"
        time.sleep(0.05)


def test_a_run_in_which_every_role_dies_once_is_the_run_in_which_none_did(
    whole: Path, finished: FinishedRun, tmp_path: Path
) -> None:
    run, folder, log = arguments(finished, tmp_path, "deaths"), tmp_path / "deaths", tmp_path / "log"
    with started(run, log) as process:
        for name, method, who in DEATHS:
            signal_within(psutil.Process(process.pid), name, method, signal.SIGKILL)
            wait_for_replacement(folder, who)
        assert process.wait(200) == 0, log.read_text()
    lost = {r["who"]: r["cause"] for r in recoveries(folder) if r["event"] == "lost"}
    assert {who: f"failed in {method}" in lost[who] for _, method, who in DEATHS} == dict.fromkeys(lost, True)
    assert [record["step"] for record in learned(folder)] == [1, 2, 3, 4]
    assert learned(folder) == learned(whole)
    for model in ("model", "model_ema"):
        mine, other = (load_file(f / model / "model.safetensors") for f in (folder, whole))
        assert all(torch.equal(mine[name], other[name]) for name in other)


def test_a_role_that_hangs_is_found_shows_its_stack_and_is_replaced(finished: FinishedRun, tmp_path: Path) -> None:
    run = arguments(finished, tmp_path, "hangs", "cluster.recovery.hang_floor_s=4")
    folder, log = tmp_path / "hangs", tmp_path / "log"
    with started(run, log) as process:
        while not (folder / "checkpoints" / "step-000001").exists():  # calls have come back: their like is known
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        signal_within(psutil.Process(process.pid), "RolloutActor", "generate", signal.SIGSTOP)
        wait_for_replacement(folder, "rollout-0")
        assert process.wait(200) == 0, log.read_text()
    (cause,) = [r["cause"] for r in recoveries(folder) if r["event"] == "lost"]
    assert "rollout rank 0 did not finish generate within" in cause
    assert "it is in File" in cause
    assert "vllm" in cause


def test_an_actor_that_may_not_be_replaced_ends_the_run_with_a_checkpoint(
    finished: FinishedRun, tmp_path: Path
) -> None:
    run = arguments(finished, tmp_path, "spent", "cluster.recovery.max_restarts=0", "checkpoint.every=100")
    folder, log = tmp_path / "spent", tmp_path / "log"
    with started(run, log) as process:
        while not (folder / "metrics.jsonl").exists() or not learned(folder):
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        signal_within(psutil.Process(process.pid), "RewardActor", "score", signal.SIGKILL)
        assert process.wait(200) == 1
    said = " ".join(log.read_text().split())
    for words in ("reward was lost once", "reward rank 0 failed in score: the actor died", "reward-0.log", "--resume"):
        assert words in said
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == learned(folder)[-1]["step"]
