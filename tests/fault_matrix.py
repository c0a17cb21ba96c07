"""Role x fault x phase, pairwise: each case is a real run, and must end as the one that nothing happened to.

    python -m tests.fault_matrix [--only WORD] [--output runs/faults] [--again]

Cases that have a good result are not run again (`--again` does). Results are lines of results.jsonl; the last thing
printed is the table of them: what happened, and how long it took.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from tests.faults import actor, kill_in_next_call, recoveries, send_within, started, wait_until
from tests.integration.hosts import Hosts, two_hosts, why_not
from tests.soak import ppo_command, ready_models, records, same_numbers, same_weights

STEPS = 8
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
# Two policy and value ranks under ZeRO; an engine of two processes; a run that is not over before anybody has noticed.
# Each has a run in peace of its own.
SHAPES: dict[str, list[str]] = {
    "plain": [],
    "two ranks": ["cluster.policy.ranks=2", "cluster.value.ranks=2", "ppo.zero_stage=1"],
    "two shards": ["rollout.tensor_parallel=2", "cluster.rollout.threads=1"],
    "long": ["ppo.steps=200"],
}


@dataclass(frozen=True)
class Case:
    role: str
    fault: str
    phase: str
    hit: Callable[[int], Any]
    """given the driver's process number: waits for the phase, and does it"""
    shape: str = "plain"
    resumes: bool = False
    """it is the driver that ends: `--resume` goes on"""

    @property
    def name(self) -> str:
        return f"{self.role} {self.fault} in {self.phase}"


def within(name: str, method: str, how: signal.Signals) -> Callable[[int], Any]:
    return lambda driver: send_within(driver, name, method, how)


def frozen(name: str, how: signal.Signals) -> Callable[[int], Any]:
    """For a role with one kind of call: whenever it is, that is the call which meets it."""

    def hit(driver: int) -> None:
        if how == KILL:
            kill_in_next_call(driver, name)
        else:
            found = actor(driver, name)
            assert found is not None
            found.send_signal(how)

    return hit


def shard(method: str, how: signal.Signals) -> Callable[[int], Any]:
    """A process of an engine's, not the actor's own, while the engine is in the method."""

    def hit(driver: int) -> None:
        found = actor(driver, "RolloutActor")
        assert found is not None
        shards = [child for child in found.children(recursive=True) if child.memory_info().rss > 2e8]
        send_within(driver, "RolloutActor", method, signal.SIGCONT)  # nothing but the moment
        shards[-1].send_signal(how)

    return hit


def driver_when(name: str, method: str, how: signal.Signals) -> Callable[[int], Any]:
    def hit(driver: int) -> None:
        send_within(driver, name, method, signal.SIGCONT)
        os.kill(driver, how)

    return hit


def _stopped_for_a_while(driver: int) -> None:
    send_within(driver, "RolloutActor", "generate", signal.SIGCONT)
    os.kill(driver, STOP)
    time.sleep(10)
    os.kill(driver, signal.SIGCONT)


def head(how: signal.Signals) -> Callable[[int], Any]:
    """Ray's own server, without which no node can go on."""

    def hit(driver: int) -> None:
        send_within(driver, "PolicyActor", "update", signal.SIGCONT)
        for child in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.name() == "gcs_server":
                    child.send_signal(how)

    return hit


ACTORS = {
    "policy rank": "PolicyActor",
    "value rank": "ValueActor",
    "reference": "ReferenceActor",
    "reward": "RewardActor",
}
LEARN = {"policy rank": ("score", "update", "publish", "save"), "value rank": ("score", "update", "save")}


def learner(role: str, phase: str, how: signal.Signals) -> Callable[[int], Any]:
    """Long calls are met in their middle; before short ones the actor is stopped, and they are what meets it."""
    if phase != "score":
        return within(ACTORS[role], {"publish": "probe"}.get(phase, phase), how)

    def hit(driver: int) -> None:
        send_within(driver, "RolloutActor", "generate", signal.SIGCONT)
        frozen(ACTORS[role], how)(driver)

    return hit


CASES = [
    *(
        Case(role, fault, phase, learner(role, phase, how))
        for role, phases in LEARN.items()
        for phase in phases
        for fault, how in (("killed", KILL), ("hung", STOP))
    ),
    *(
        Case(role, fault, "score", frozen(ACTORS[role], how))
        for role in ("reference", "reward")
        for fault, how in (("killed", KILL), ("hung", STOP))
    ),
    *(
        Case("rollout worker", fault, phase, within("RolloutActor", method, how))
        for phase, method in (("generate", "generate"), ("publish", "verify"))
        for fault, how in (("killed", KILL), ("hung", STOP))
    ),
    Case("policy rank 1 of 2", "killed", "update", within("PolicyActor", "update", KILL), "two ranks"),
    Case("policy rank 1 of 2", "hung", "update", within("PolicyActor", "update", STOP), "two ranks"),
    Case("engine process", "killed", "generate", shard("generate", KILL), "two shards"),
    Case("engine process", "hung", "generate", shard("generate", STOP), "two shards"),
    Case("engine process", "killed", "publish", shard("verify", KILL), "two shards"),
    *(
        Case("driver", "killed", phase, driver_when(name, method, KILL), resumes=True)
        for phase, name, method in (
            ("generate", "RolloutActor", "generate"),
            ("score", "RewardActor", "score"),
            ("update", "PolicyActor", "update"),
            ("publish", "RolloutActor", "verify"),
            ("save", "PolicyActor", "save_state"),
        )
    ),
    Case("driver", "hung for 10 s", "generate", _stopped_for_a_while),
    Case("head", "killed", "update", head(KILL), "long", resumes=True),
    Case("head", "hung", "update", head(STOP), "long", resumes=True),
]


# Calls of a phase, as the run's own records name the one that was lost.
CALLS = {
    "generate": ("generate", "next_part"),
    "score": ("score",),
    "update": ("update",),
    "publish": ("start_publish", "next_bucket", "probe", "load_bucket", "verify"),
    "save": ("save", "save_state"),
}
TRIES = 3


class Missed(AssertionError):
    """The fault came at another time, or met nobody."""


def check_witness(case: Case, lost: Sequence[str]) -> None:
    """The run's records say that the role was lost in the phase. A driver, and a head, have their exit to say so."""
    if case.resumes or case.role == "driver":
        return
    role = {"rollout worker": "rollout", "engine process": "rollout"}.get(case.role, case.role.split()[0])
    called = "|".join(CALLS[case.phase])
    if not lost or not re.match(rf"{role} rank \d+ (failed in|did not finish) ({called})\b", lost[0]):
        raise Missed(f"{case.name}: the run's records have {lost[:1]}")


def run_case(case: Case, command: list[str], folder: Path, quiet: Path, log: Path) -> dict[str, Any]:
    """Raises AssertionError where the run does not come to its end, or not to the same one."""
    with started(command, log) as process:
        wait_until((folder / "checkpoints" / "step-000002").exists, process, 200)
        start = time.monotonic()
        case.hit(process.pid)
        before = len(records(folder))
        if case.resumes:
            code = process.wait(300)
            said = " ".join(log.read_text()[-600:].split())
        else:
            wait_until(lambda: len(records(folder)) > before or len(records(folder)) == STEPS, process, 300)
            code, said = process.wait(300), ""
        seconds = time.monotonic() - start
    if case.resumes:
        assert code != 0, "the run went on by itself"
        start = time.monotonic()
        with started([*command, "--resume"], log) as process:
            code = process.wait(300)
            seconds = time.monotonic() - start
    assert code == 0, log.read_text()[-2000:]
    check_end(quiet, folder)
    happened = recoveries(folder)
    lost = [record["cause"] for record in happened if record["event"] == "lost"]
    check_witness(case, lost)
    mended = [record["seconds"] for record in happened if record["event"] == "replaced"]
    return {"recovery_s": mended or None, "to_the_end_s": seconds, "cause": lost, "said": said}


def check_end(quiet: Path, folder: Path) -> None:
    """As in peace: every number of its records, its weights, and each sample accounted for."""
    differences = [*same_numbers(quiet, folder), *same_weights(quiet, folder)]
    assert not differences, differences[:3]
    command = [sys.executable, "-m", "rayrlhf.cli", "audit", str(folder)]
    audit = subprocess.run(command, capture_output=True, check=False)
    assert audit.returncode == 0, audit.stdout.decode()


def node_case(fault: str, sft: str, reward: str, output: Path, quiet: Path) -> dict[str, Any]:
    """The engine's node goes, and a spare one joins."""
    name = f"node-{fault.replace(' ', '-')}"
    folder = output / name / "run"  # where the same run has not been done yet
    with two_hosts(output) as hosts:
        command = [
            *ppo_command(sft, reward, folder, STEPS, 0),
            f"cluster.address={hosts.address}",
            "cluster.rollout.resources={host_b: 0.01}",
            *(f"cluster.{role}.resources={{host_a: 0.01}}" for role in ("policy", "value", "reference", "reward")),
        ]
        with open(output / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                hosts.inside("a", sys.executable, "-m", "rayrlhf.cli", *command),
                env=hosts.environment,
                stdout=log,
                stderr=log,
            )
            try:
                return _lose_node(hosts, process, folder, quiet, fault)
            finally:
                process.kill()


def _lose_node(hosts: Hosts, process: subprocess.Popen[bytes], folder: Path, quiet: Path, fault: str) -> dict[str, Any]:
    wait_until((folder / "checkpoints" / "step-000002").exists, process, 200)
    start = time.monotonic()
    if fault == "killed":
        for child in psutil.Process(hosts.nodes["b"].pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    else:
        hosts.cut()
    hosts.start_spare({"host_b": 1})
    assert process.wait(400) == 0, (folder.parents[1] / f"{folder.parent.name}.log").read_text()[-2000:]
    happened = recoveries(folder)
    check_end(quiet, folder)
    lost = [record["cause"] for record in happened if record["event"] == "lost"]
    if not lost or not lost[0].startswith("rollout rank 0 "):
        raise Missed(f"node {fault}: the run's records have {lost[:1]}")
    return {
        "recovery_s": [record["seconds"] for record in happened if record["event"] == "replaced"],
        "to_the_end_s": time.monotonic() - start,
        "cause": lost,
        "said": "",
    }


def result_of(go: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """A fault that comes at another time than it is to is tried again."""
    for left in reversed(range(TRIES)):
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt: its run is done
        try:
            return {"ok": True, **go()}
        except AssertionError as error:
            if not isinstance(error, Missed) or not left:
                return {"ok": False, "why": str(error)[-1500:]}
    raise AssertionError("there is at least one try")


def main(only: str = "", output: Path = Path("runs/faults"), again: bool = False) -> None:
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.jsonl"
    done = {row["case"]: row for row in map(json.loads, results.read_text().splitlines())} if results.exists() else {}
    sft, reward = ready_models(output)
    quiet = {shape: output / "peace" / shape.replace(" ", "-") for shape in SHAPES}

    def in_peace(shape: str) -> Path:
        folder = quiet[shape]
        if len(records(folder)) < STEPS:
            command = [*ppo_command(sft, reward, folder, STEPS, 0), *SHAPES[shape]]
            with started(command, output / f"peace-{folder.name}.log") as process:
                assert process.wait(400) == 0
        return folder

    todo: list[tuple[str, tuple[str, str, str], Callable[[], dict[str, Any]]]] = []
    for case in CASES:
        name = case.name.replace(" ", "-")
        folder = output / name / "run"  # where the same run has not been done yet
        command = [*ppo_command(sft, reward, folder, STEPS, 0), *SHAPES[case.shape]]

        def run(case: Case = case, command: list[str] = command, folder: Path = folder) -> dict[str, Any]:
            return run_case(case, command, folder, in_peace(case.shape), output / f"{folder.parent.name}.log")

        todo.append((case.name, (case.role, case.fault, case.phase), run))
    for fault in ("killed", "link lost"):

        def lose(fault: str = fault) -> dict[str, Any]:
            return node_case(fault, sft, reward, output, in_peace("plain"))

        todo.append((f"node {fault}", ("node", fault, "generate"), lose))
    for case_name, (role, fault, phase), go in todo:
        if only not in case_name or (case_name in done and done[case_name]["ok"] and not again):
            continue
        if role == "node" and (reason := why_not()):
            print(f"{case_name}: skipped, {reason}")
            continue
        row: dict[str, Any] = {"case": case_name, "role": role, "fault": fault, "phase": phase}
        row |= result_of(go, output / case_name.replace(" ", "-"))
        done[case_name] = row
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row)[:400], flush=True)
    table = Table("role", "fault", "phase", "ends as in peace", "replaced after, s")
    for row in done.values():
        seconds = ", ".join(f"{s:.0f}" for s in row.get("recovery_s") or ())
        table.add_row(row["role"], row["fault"], row["phase"], "yes" if row["ok"] else "NO", seconds)
    Console().print(table)
    raise typer.Exit(0 if all(row["ok"] for row in done.values()) else 1)


if __name__ == "__main__":
    typer.run(main)
