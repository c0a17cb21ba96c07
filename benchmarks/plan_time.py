"""The plan's seconds beside real PPO steps on this CPU, phase by phase, after `plan --calibrate`.

    python benchmarks/plan_time.py [--cases 10M:32:128,10M:64:96,30M:32:192] [--json]

A case is a size, responses a step and tokens of the longest response; none of them is used in calibrating, which is
done again before each: a shared machine is not equally fast all the time. Measured is the stage `ppo` as `rayrlhf run`
runs it, with given log-normal lengths, a quarter of the longest in the mean; its seconds are those of its own records,
medians of the steps after the first. The plan is told the mean lengths and their spread, and nothing else.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median, stdev
from time import perf_counter
from typing import Annotated, Any

import typer
from common import machine, print_result, print_table
from lengths import actor_with_lengths, given_lengths
from ppo_step import _config, _make_inputs
from rich.console import Console

from rayrlhf.config import Config
from rayrlhf.config.model import FromScratch
from rayrlhf.launch.calibrate import measure_this_machine
from rayrlhf.planning.command import asked_of, plan_of
from rayrlhf.planning.plan import Plan
from rayrlhf.stages import roles
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.datasets import Datasets
from rayrlhf.stages.ppo import run_ppo_stage

PHASES = ("generate", "score", "update", "publish")
SHAPES = {
    "10M": FromScratch(hidden_size=384, layers=5, heads=6, vocab_size=2048, context=512),
    "30M": FromScratch(hidden_size=512, layers=9, heads=8, vocab_size=2048, context=512),
}


def main(
    cases: str = "10M:32:128,10M:64:96,30M:32:192",
    steps: int = 9,
    as_json: Annotated[bool, typer.Option("--json", help="The last line alone.")] = False,
) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for case in cases.split(","):
            size, batch, longest = case.split(":")
            folder = Path(name) / case.replace(":", "-")
            folder.mkdir()
            _make_inputs(folder, SHAPES[size], int(batch))
            config = _config(folder, steps, int(batch), int(longest), [])
            start = perf_counter()
            hardware = measure_this_machine(config, None)
            print(f"calibrated in {perf_counter() - start:.0f} s\n{hardware.read_text(encoding='utf-8')}")
            rows += compared(case, config, folder, hardware)
    if not as_json:
        print_table("seconds of a step", rows)
    print_result({**machine("cpu"), "steps": steps, "rows": rows})


def compared(case: str, config: Config, folder: Path, hardware: Path) -> list[dict[str, Any]]:
    """A row a phase, and one for their sum."""
    lengths = given_lengths("log-normal", config.ppo.batch_size, config.rollout.max_tokens)
    data = Datasets(config, config.sft.path)
    prompts = [len(prompt.tokens) for prompt in data.prompts.tokens]
    planned = plan(config, hardware, sum(prompts) / len(prompts), lengths).time.phases
    measured = run(config, data, lengths, folder)
    pairs = {phase: (measured[phase], planned[phase]) for phase in PHASES}
    pairs["sum"] = (sum(m for m, _ in pairs.values()), sum(p for _, p in pairs.values()))
    return [
        {"case": case, "phase": phase, "measured": m, "planned": p, "planned_over_measured_ratio": p / m}
        for phase, (m, p) in pairs.items()
    ]


def plan(config: Config, hardware: Path, prompt: float, lengths: list[int]) -> Plan:
    mean, spread = sum(lengths) / len(lengths), stdev(map(math.log, lengths))
    told = {
        "prompt_share": prompt / config.data.max_prompt_tokens,
        "response_share": mean / config.rollout.max_tokens,
        "response_spread": spread,
    }
    return plan_of(asked_of(config, str(hardware), assume=told))


def run(config: Config, data: Datasets, lengths: list[int], folder: Path) -> dict[str, float]:
    """Medians of the steps after the first."""
    (workspace := folder / "ppo").mkdir()
    records = _Records()
    context = StageContext(config, data, folder / "run", records, Console(quiet=True))  # type: ignore[arg-type]
    roles.RolloutActor = actor_with_lengths(lengths)
    try:
        run_ppo_stage(context, {"sft": str(config.sft.path), "reward": str(config.reward.path)}, workspace)
    finally:
        context.close()
    return {phase: median(row[f"time/{phase}_s"] for row in records.rows[1:]) for phase in PHASES}


class _Records:
    """A sink that keeps what the stage says of its steps."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def write(self, record: Mapping[str, Any]) -> None:
        self.rows.append(record)

    def write_sample(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


if __name__ == "__main__":
    typer.run(main)
