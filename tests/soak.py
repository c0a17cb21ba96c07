"""A long PPO in which somebody dies or hangs every few steps, beside the same run in peace.

    python -m tests.soak [--steps 200] [--seeds 0,1,2] [--every 5] [--output runs/soak] [--one-world]

With `--one-world` the seeds are those of the faults alone, and one run in peace is enough for all of them.

Both are deterministic, so nothing may differ: not one number of a step's record (but how long things took), not one
weight. The ledger must be clean, and nothing may be left of the run: no process, no shared memory; the driver holds no
more files at its end than at its start. Prints a table and, as its last line, JSON.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from tests.faults import recoveries, send_within, session, started, wait_until

__all__ = ["SMALL", "Report", "same_numbers", "soak"]

# Who, in which of its calls.
VICTIMS = (
    *(("RolloutActor", call) for call in ("generate", "verify")),
    *(("RewardActor", "score"), ("ReferenceActor", "score")),
    *(("PolicyActor", call) for call in ("score", "estimate", "update", "start_publish", "probe", "save_state")),
    *(("ValueActor", call) for call in ("score", "update", "save_state")),
)
DRIVER, SMALLEST_GAP = "driver", 2
# Of a driver, late over early: connections come and go while somebody is replaced.
MORE_FILES = 8
SMALL = (
    "model.from_scratch.hidden_size=64",
    "model.from_scratch.heads=2",
    "model.from_scratch.layers=2",
    "pretrain.epochs=1",
    "pretrain.max_steps=20",
    "sft.epochs=1",
)
# Faults follow each other as they never do: the budget is not what is tried here.
PATIENT = (
    *("cluster.recovery.max_restarts=1000", "cluster.recovery.window_s=1", "cluster.recovery.hang_floor_s=4"),
    "cluster.call_timeout_s=60",
)
# Of a record: what says how fast and how large, and differs from run to run.
MEASURED = ("time/", "throughput/", "memory/", "rollout/seconds", "rollout/tail_share", "weights/")

Fault = tuple[int, tuple[str, str], signal.Signals]
"""After which step, who in which call, and how."""


@dataclass
class Report:
    """What came of one seed."""

    faults: Counter[str] = field(default_factory=Counter)
    restarts_s: dict[str, list[float]] = field(default_factory=dict)
    """seconds from the loss to the replacement, by role"""
    files: tuple[int, int] = (0, 0)
    """open in the driver, early and late"""
    left: list[str] = field(default_factory=list)
    """processes and shared memory that outlived the run"""


def soak(command: Sequence[str], folder: Path, steps: int, every: int, seed: int, log: Path) -> Report:
    report, rng, memory = Report(), random.Random(seed), _shared_memory()
    schedule = _schedule(rng, steps, every)
    due = next(schedule, None)
    while True:
        with started([*command, "--resume"], log) as process:
            files = _OpenFiles(process.pid)
            while process.poll() is None and due is not None:
                after, (who, method), how = due
                with suppress(AssertionError):  # the run was over before
                    wait_until(lambda after=after: _steps_of(folder) >= after, process, 600)  # type: ignore[misc]
                    _hit(process, folder, who, method, how)
                    report.faults[f"{who}.{method} {how.name}"] += 1
                due = next(schedule, None)
                if who == DRIVER:
                    break
            code = process.wait(900)
            report.files = files.early_and_late()
            if code == 0:
                report.left = _processes_left(process.pid)
                break
            assert code == -signal.SIGKILL, f"the run ended with {code}: {log.read_text()[-2000:]}"
    report.left += sorted(_shared_memory() - memory)
    for record in recoveries(folder):
        if record["event"] == "replaced":
            report.restarts_s.setdefault(record["who"], []).append(record["seconds"])
    return report


def _schedule(rng: random.Random, steps: int, every: int) -> Iterator[Fault]:
    """The driver dies too, once in a while."""
    at = 2
    while at < steps - 1:
        if rng.random() < 0.1:
            yield at, (DRIVER, "any"), signal.SIGKILL
        else:
            yield at, rng.choice(VICTIMS), rng.choice([signal.SIGKILL] * 3 + [signal.SIGSTOP])
        at += rng.randint(SMALLEST_GAP, 2 * every - SMALLEST_GAP)


def _hit(process: subprocess.Popen[bytes], folder: Path, who: str, method: str, how: signal.Signals) -> None:
    """And wait until it is mended."""
    if who == DRIVER:
        process.send_signal(how)
        return
    before = _mended(folder)
    send_within(process.pid, who, method, how)
    wait_until(lambda: _mended(folder) > before, process, 300)


def _mended(folder: Path) -> int:
    return sum(record["event"] == "replaced" for record in recoveries(folder))


def _steps_of(folder: Path) -> int:
    return max((record["step"] for record in records(folder)), default=0)


def records(folder: Path) -> list[dict[str, Any]]:
    """Of PPO's steps, as far as they are written."""
    path = folder / "metrics.jsonl"
    with suppress(OSError, ValueError):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [record for record in found if record["stage"] == "ppo"]
    return []


def same_numbers(one: Path, other: Path) -> list[str]:
    """What differs between the records of two runs, but for measurements of the machine."""
    mine, theirs = records(one), records(other)
    if [r["step"] for r in mine] != [r["step"] for r in theirs]:
        return [f"steps {[r['step'] for r in mine]} and {[r['step'] for r in theirs]}"]
    return [
        f"step {a['step']}: {key} {a.get(key)} and {b.get(key)}"
        for a, b in zip(mine, theirs, strict=True)
        for key in sorted(a.keys() | b.keys())
        if not key.startswith(MEASURED) and a.get(key) != b.get(key)
    ]


def same_weights(one: Path, other: Path) -> list[str]:
    """Files of the two runs' policies that are not there in both, or differ in a byte."""
    folders = [folder / "model" for folder in (one, other)]
    names = {path.name for folder in folders for path in folder.glob("*.safetensors")}
    assert names, f"no policy in {one} and {other}"
    held = [{name: path.read_bytes() for name in names if (path := folder / name).exists()} for folder in folders]
    return [f"weights of {name} differ" for name in sorted(names) if held[0].get(name) != held[1].get(name)]


class _OpenFiles:
    """How many files the driver has open, once a second for as long as it lives."""

    def __init__(self, driver: int) -> None:
        self._seen: list[int] = []
        threading.Thread(target=self._look, args=(psutil.Process(driver),), daemon=True).start()

    def _look(self, driver: psutil.Process) -> None:
        with suppress(psutil.Error):
            while driver.status() != psutil.STATUS_ZOMBIE:
                self._seen.append(driver.num_fds())
                time.sleep(1.0)

    def early_and_late(self) -> tuple[int, int]:
        """Medians of the second and of the last quarter: the first starts things."""
        quarter = max(1, len(self._seen) // 4)
        early, late = self._seen[quarter : 2 * quarter] or [0], self._seen[-quarter:] or [0]
        return int(median(early)), int(median(late))


def _processes_left(leader: int) -> list[str]:
    """What is still there of the run's session ten seconds after its end."""
    deadline = time.monotonic() + 10
    while (left := session(leader)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"process {pid}" for pid in left]


def _shared_memory() -> set[str]:
    return {p.name for p in Path("/dev/shm").glob("*")}


def ready_models(output: Path) -> tuple[str, str]:
    """An SFT and a reward model of the tiny world; made once."""
    name = "ready"
    stages = "run.stages=[pretrain,sft,collect,reward]"
    command = ["run", "configs/tiny.yaml", f"run.name={name}", f"run.output={output}", stages, *SMALL]
    done = subprocess.run([sys.executable, "-m", "rayrlhf.cli", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stages_of: Any = json.loads((output / name / "summary.json").read_text())["stages"]
    return stages_of["sft"]["model"], stages_of["reward"]["model"]


def ppo_command(sft: str, reward: str, folder: Path, steps: int, seed: int) -> list[str]:
    return [
        *("ppo", "configs/tiny.yaml", f"run.name={folder.name}", f"run.output={folder.parent}", f"run.seed={seed}"),
        *(f"model={{path: {sft}}}", f"sft.path={sft}", f"reward.path={reward}"),
        *(f"ppo.steps={steps}", "ppo.batch_size=16", "ppo.minibatch_size=8", "ppo.learning_rate=1e-4"),
        *("rollout.max_tokens=12", "run.deterministic=true", "checkpoint.every=1", "ppo.ptx.coef=0.5"),
        *("ppo.ptx.examples_per_episode=0.5", *PATIENT),
    ]


def main(
    steps: int = 200,
    seeds: str = "0,1,2",
    every: int = 5,
    output: Path = Path("runs/soak"),
    one_world: Annotated[bool, typer.Option("--one-world", help="Seeds are of the faults alone.")] = False,
) -> None:
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    sft, reward = ready_models(output)
    table = Table("seed", "faults", "reward, at peace", "reward, with faults", "differs", "files", "left over")
    rows = []
    for seed in map(int, seeds.split(",")):
        # Each in an output of its own: the same run in the same place would be done already.
        world = 0 if one_world else seed
        one, other = output / "peace" / f"seed-{world}", output / f"faults-{seed}" / f"seed-{world}"
        if _steps_of(one) < steps:
            with started(ppo_command(sft, reward, one, steps, world), output / f"peace-{world}.log") as process:
                assert process.wait(3600) == 0
        report = soak(ppo_command(sft, reward, other, steps, world), other, steps, every, seed, output / f"{seed}.log")
        audit = subprocess.run([sys.executable, "-m", "rayrlhf.cli", "audit", str(other)], check=False)
        rewards = [records(folder)[-1]["reward/mean"] for folder in (one, other)]
        differences = [*same_numbers(one, other), *same_weights(one, other)]
        table.add_row(
            str(seed),
            str(report.faults.total()),
            *(f"{reward:.6f}" for reward in rewards),
            str(len(differences)),
            f"{report.files[0]} -> {report.files[1]}",
            str(len(report.left)),
        )
        rows.append(
            {
                "seed": seed,
                "steps": steps,
                "faults": dict(report.faults),
                "restart_s": {who: sum(s) / len(s) for who, s in report.restarts_s.items()},
                "reward": rewards,
                "differences": differences[:5],
                "audit": audit.returncode,
                "files": report.files,
                "left": report.left,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    Console().print(table)
    print(json.dumps(rows))
    bad = [row for row in rows if row["differences"] or row["audit"] or row["left"] or not row["faults"]]
    bad += [row for row in rows if row["files"][1] > row["files"][0] + MORE_FILES]
    raise typer.Exit(1 if bad else 0)


if __name__ == "__main__":
    typer.run(main)
