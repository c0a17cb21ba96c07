"""What the control plane costs: the real driver, pools and Ray actors, with stand-ins for engines and learners.

    python benchmarks/control.py [--actors 2,8,32,64] [--steps 40] [--json]

A stand-in waits as long as the real thing would take, and answers with ids and empty handles. What is left is the
driver's own work: its CPU seconds per actor and step, of all actors (a rank each of policy, value, reference and reward
beside the engines) and of the rollout actors alone, the length of an overlapping step beside its longer side,
its memory over a hundred steps, the ledger's time for a step of 512 samples, the flush to the disk included, and what
looking after everybody's health takes of a step.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import ray
import typer
from common import machine, print_result, print_table

from rayrlhf.actors.base import leaves_data
from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.head import _knock
from rayrlhf.actors.placement import RolePlacement
from rayrlhf.actors.pool import EnginePool
from rayrlhf.actors.roles import LearnerRoles, ScorerRoles, StepPlan
from rayrlhf.algorithms.kl import FixedKL
from rayrlhf.checkpoint.ledger import Facts
from rayrlhf.driver.loop import Parts, run_ppo
from rayrlhf.driver.pacing import OverlapPacing, PromptStream, SyncPacing
from rayrlhf.driver.protocols import RolloutBatch, ScoredBatch
from rayrlhf.driver.recovery import Deadlines
from rayrlhf.metrics.clock import StepClock
from rayrlhf.stages.ledger import Ledger
from rayrlhf.types import PromptTokens, RolloutInfo, SampleRequest
from rayrlhf.weights.probe import ProbeRow
from rayrlhf.weights.publish import EngineReceipt, SentBucket, WeightPublisher

PER_ENGINE, BUCKETS, WARM_UP, START_S = 16, 1, 5, 600.0
ROWS = [ProbeRow([1, 2], [3, 4])]
MEMORY_STEPS = 100
MODELS = ("policy", "value", "reference", "reward")


class StandIn:
    """What every actor answers."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def node(self) -> str:
        return "here"

    def memory_gib(self) -> float:
        return 0.0


class Engine(StandIn):
    @leaves_data
    def generate(
        self, version: int, requests: Sequence[SampleRequest], at_once: int, temperature: float | None
    ) -> tuple[list[RolloutInfo], bytes]:
        infos = [RolloutInfo(r.sample_id, r.prompt_id, 64, 32, False, version) for r in requests]
        self.parts = iter([infos[start : start + at_once] for start in range(0, len(infos), at_once)])
        self.pause = self.seconds * at_once / len(requests)
        return self.next_part()

    @leaves_data
    def next_part(self) -> tuple[list[RolloutInfo], bytes]:
        time.sleep(self.pause)
        return next(self.parts), b""

    def load_bucket(self, ticket: dict[str, Any]) -> None:
        if ticket["header"]["index"] == 0:
            self.sent: list[str] = []
        self.sent.append(ticket["fingerprint"])

    def verify(self, ticket: dict[str, Any], rows: Sequence[ProbeRow]) -> EngineReceipt:
        self.load_bucket(ticket)
        return EngineReceipt(tuple(self.sent), (), (0.0,) * 2)


class Model(StandIn):
    """Policy, value, reference or reward."""

    buckets = BUCKETS

    def start_publish(self, version: int, elsewhere: bool, again: bool = False) -> SentBucket:
        self.version, self.index = version, 0
        return self.next_bucket()

    def next_bucket(self) -> SentBucket:
        header, fingerprint = {"version": self.version, "index": self.index}, f"{self.version}-{self.index}"
        self.index += 1
        ticket = {"header": header, "fingerprint": fingerprint}
        return SentBucket(ticket, fingerprint, 2**20, self.index == self.buckets, 1e-3)

    def probe(self, rows: Sequence[ProbeRow]) -> list[float]:
        return [0.0] * 2

    @leaves_data
    def score(self, ids: Sequence[int], *chunks: bytes) -> tuple[dict[int, str], bytes]:
        return {}, b""

    @leaves_data
    def estimate(self, ids: Sequence[int], *rest: Any) -> tuple[Any, bytes]:
        return ({"kl/mean": 0.0, "kl/per_token": 0.0, "reward/mean": 0.0}, []), b""

    def update(self, minibatches: Sequence[Sequence[int]], *rest: Any) -> dict[str, float]:
        time.sleep(self.seconds)
        return {"policy/loss": 0.0}


class Nothing:
    """Checkpoints, gauges and the records' sink."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float, int]] = []
        """(wall, CPU, resident bytes) at the end of each step"""

    async def save(self, step: int, kl_coef: float, metrics: Any, due: bool = False) -> bool:
        return False

    async def gauges(self) -> dict[str, float]:
        return {}

    def write_samples(self, step: int, samples: Any) -> None: ...

    def write(self, record: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time(), psutil.Process().memory_info().rss))


def main(
    actors: str = "2,8,32,64",
    steps: int = 40,
    memory_steps: int = MEMORY_STEPS,
    as_json: Annotated[bool, typer.Option("--json", help="The last line alone.")] = False,
) -> None:
    os.environ["RAY_DEDUP_LOGS"] = "0"
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
    rows = [asyncio.run(_measure(count, steps)) for count in map(int, actors.split(","))]
    facts = {**machine("cpu"), "steps": steps, "growth_ratio": rows[-1]["driver_cpu_ms"] / rows[0]["driver_cpu_ms"]}
    facts |= asyncio.run(_overlap()) | asyncio.run(_memory(memory_steps)) | {"ledger_step_ms": _ledger_ms()}
    facts["health_step_ms"] = _health_ms()
    ray.shutdown()
    if not as_json:
        print_table("driver CPU per actor and step; stand-ins that take no time", rows)
    print_result({**facts, "rows": rows})


async def _measure(engines: int, steps: int) -> dict[str, Any]:
    marks = await _run(engines, steps + WARM_UP, 0.0, 0.0, overlap=False)
    pairs = list(itertools.pairwise(marks[WARM_UP - 1 :]))
    cpu, wall = [b[1] - a[1] for a, b in pairs], [b[0] - a[0] for a, b in pairs]
    return {
        "rollout_actors": engines,
        "responses": engines * PER_ENGINE,
        "step_ms": 1000 * median(wall),
        "driver_cpu_ms_per_step": 1000 * sum(cpu) / len(cpu),
        "driver_cpu_ms": 1000 * sum(cpu) / len(cpu) / (engines + len(MODELS)),
        "driver_cpu_ms_per_rollout_actor": 1000 * sum(cpu) / len(cpu) / engines,
    }


async def _overlap() -> dict[str, float]:
    """A step whose sides take 0.6 and 0.5 s, one after the other and overlapping."""
    sides = {}
    for overlap in (False, True):
        marks = await _run(2, 9, 0.6, 0.5, overlap)
        sides[overlap] = median(b[0] - a[0] for a, b in itertools.pairwise(marks[1:]))
    ratio = sides[True] / 0.6
    return {"sync_step_s": sides[False], "overlap_step_s": sides[True], "overlap_to_longer_side_ratio": ratio}


async def _memory(steps: int) -> dict[str, float]:
    marks = await _run(8, steps + 20, 0.0, 0.0, overlap=False)
    grown = (marks[-1][2] - marks[19][2]) / 2**20
    return {"memory_steps": steps, "driver_mib_after_20_steps": marks[19][2] / 2**20, "driver_mib_grown_since": grown}


def _ledger_ms(samples: int = 512, steps: int = 50) -> float:
    with tempfile.TemporaryDirectory(dir=".") as folder:  # /tmp may be memory, on which a flush costs nothing
        ledger, took = _new_ledger(folder, range(20_000), samples), list[float]()
        stream = PromptStream(range(20_000), seed=0)
        for step in range(1, steps + 1):
            infos = tuple(RolloutInfo(r.sample_id, r.prompt_id, 64, 32, False) for r in stream.take(samples))
            start = time.perf_counter()
            ledger.step(step, ScoredBatch(RolloutBatch(infos, ()), (), step))
            took.append(time.perf_counter() - start)
    return 1000 * median(took)


def _health_ms(calls: int = 100, steps: int = 50) -> float:
    """Of a step of so many calls: a deadline for each and what it took, and a knock at Ray's head, which is due every
    other second."""
    deadlines, took = Deadlines(60.0, 10.0, 1800.0), list[float]()
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    for _ in range(steps):
        start = time.perf_counter()
        for _ in range(calls):
            deadlines.of("update")
            deadlines.took("update", 1.0)
        _knock(host, int(port))
        took.append(time.perf_counter() - start)
    return 1000 * median(took)


def _new_ledger(folder: str, prompt_ids: Sequence[int], batch_size: int) -> Ledger:
    ledger = Ledger(Path(folder), Facts.of(0, prompt_ids, 1, batch_size))
    ledger.start_from(None)
    return ledger


async def _run(engines: int, steps: int, generate_s: float, update_s: float, overlap: bool) -> list[Any]:
    groups = {
        role: ActorGroup(RolePlacement(role, engines if role == "rollout" else 1, 0.01, 0, 1), START_S)
        for role in (*MODELS, "rollout")
    }
    try:
        for role, group in groups.items():
            actor, seconds = (Engine, generate_s) if role == "rollout" else (Model, update_s)
            await group.spawn(actor, [(seconds,)] * group.ranks, START_S)
        await asyncio.gather(*(group.call("node") for group in groups.values()))
        return await _loop(groups, engines * PER_ENGINE, steps, overlap)
    finally:
        for group in groups.values():
            group.close()


async def _loop(groups: dict[str, ActorGroup], batch: int, steps: int, overlap: bool) -> list[Any]:
    prompts = [PromptTokens(i, [1] * 32) for i in range(4 * batch)]  # type: ignore[arg-type]
    pool = EnginePool(groups["rollout"], groups["policy"], WeightPublisher(ROWS, "float32", None), prompts)
    plan = StepPlan(batch, 1, 0, 1, 0, 1.0, lambda step: (1e-5, 1e-5))
    nothing, ids = Nothing(), [p.prompt_id for p in prompts]
    with tempfile.TemporaryDirectory() as folder:
        clock = StepClock(Path(folder) / "trace.json")
        parts = Parts(
            rollout=pool,
            scorers=ScorerRoles([groups["reference"], groups["reward"]], [groups["policy"], groups["value"]]),
            learners=LearnerRoles(groups["policy"], groups["value"], plan),
            weights=pool,
            checkpoints=nothing,
            ledger=_new_ledger(folder, ids, batch),
            sink=nothing,
            clock=clock,
            gauges=nothing.gauges,
        )
        stream = PromptStream(ids, seed=0)
        pacing = OverlapPacing(stream, batch, steps, clock, 1) if overlap else SyncPacing(stream, batch, steps, clock)
        await run_ppo(parts, pacing, FixedKL(0.0))
        clock.close()
    return nothing.marks


if __name__ == "__main__":
    typer.run(main)
