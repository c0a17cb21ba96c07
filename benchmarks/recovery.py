"""How long a lost rollout worker takes to be there again, beside its cold start.

    python benchmarks/recovery.py [--rounds 5] [--json]

Each round, in turn: an engine of the demo's shape is placed, started, and loads its model; then its process gets
SIGKILL, the next call to it finds so, and it is replaced as a run replaces it, `cluster.recovery.backoff_s` of waiting
included. Medians of the rounds; the last line is JSON.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import ray
import typer
from common import engine_settings, machine, paired_ratio, print_result, print_table

from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.placement import RolePlacement
from rayrlhf.actors.rollout import RolloutActor
from rayrlhf.config.cluster import RecoveryConfig
from rayrlhf.config.model import FromScratch
from rayrlhf.errors import ActorLost
from rayrlhf.models.build import from_scratch
from rayrlhf.types import PromptTokens

ROUNDS, START_S, CONTEXT, EOS = 5, 300.0, 128, 0
DEMO = FromScratch(vocab_size=512, hidden_size=256, layers=5, heads=4, context=CONTEXT)
PROMPTS = [PromptTokens(0, np.arange(1, 9, dtype=np.int32))]


def main(
    rounds: int = ROUNDS,
    as_json: Annotated[bool, typer.Option("--json", help="The last line alone.")] = False,
) -> None:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    with tempfile.TemporaryDirectory() as folder:
        from_scratch(DEMO, DEMO.vocab_size, EOS, 1, seed=0).lm.save_pretrained(folder)
        pairs = [asyncio.run(_round(folder)) for _ in range(rounds)]
    ray.shutdown()
    cold, recovered = ([pair[i] for pair in pairs] for i in (0, 1))
    row = {
        "cold_start_s": median(cold),
        "recovery_s": median(recovered),
        **paired_ratio("recovery_to_cold_start", recovered, cold),
    }
    if not as_json:
        print_table(f"a rollout worker, medians of {rounds}", [row])
    print_result({**machine("cpu"), "rounds": rounds, **row})


async def _round(folder: str) -> tuple[float, float]:
    """Seconds of the cold start and of the recovery."""
    log = f"{tempfile.gettempdir()}/rayrlhf-recovery.log"
    arguments: list[tuple[Any, ...]] = [(log, engine_settings(folder, CONTEXT, 32, 64, 2))]
    start = perf_counter()
    group = ActorGroup(RolePlacement("rollout", 1, 1, 0, 2), START_S)
    await group.spawn(RolloutActor, arguments, START_S)
    await _become(group)
    cold = perf_counter() - start
    (where,) = await group.call("whereabouts")
    lost = perf_counter()
    os.kill(where.pid, signal.SIGKILL)
    try:
        await group.call("memory_gib")
        raise AssertionError("it answers")
    except ActorLost:
        await asyncio.sleep(RecoveryConfig().backoff_s)
    await group.respawn(START_S)
    await _become(group)
    recovered = perf_counter() - lost
    await group.call("close")
    group.close()
    return cold, recovered


async def _become(group: ActorGroup) -> None:
    await group.call("start", PROMPTS, timeout_s=START_S)
    await group.locate()


if __name__ == "__main__":
    typer.run(main)
