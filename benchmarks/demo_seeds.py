"""The demo for several seeds: what each arm is worth, by seed and in the mean.

    python benchmarks/demo_seeds.py configs/demo.yaml --seeds 0,1,2 [section.key=value ...]

Every seed makes its own world, models and held-out prompts. Stages that are done already are taken, not run again; then
`seconds of the command` is short, while the stages' seconds are those they took. Prints the tables of the README; the
last line is JSON.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from rayrlhf.config import load_config
from rayrlhf.evaluation.comparison import win_rate

MEASURES = {
    "gold_win_rate": "gold win rate over SFT",
    "length_controlled_win_rate": "at equal length",
    "gold_mean": "gold",
    "kl_per_response": "KL, nats a response",
    "pretrain_loss": "loss on text",
    "cloze_accuracy": "choices right",
    "length_mean": "tokens a response",
}


def main(config: Path, overrides: Annotated[list[str] | None, typer.Argument()] = None, seeds: str = "0,1,2") -> None:
    """`seeds` are separated by commas."""
    console, runs = Console(), {}
    for seed in map(int, seeds.split(",")):
        arguments = [str(config), *(overrides or ()), f"run.seed={seed}", f"world.seed={seed}"]
        arguments.append(f"run.name=demo-seed-{seed}")
        start = perf_counter()
        subprocess.run([sys.executable, "-m", "rayrlhf.cli", "run", *arguments], check=True, stdout=sys.stderr)
        settings = load_config(config, arguments[1:])
        summary = settings.run.output / settings.run.name / "summary.json"
        runs[seed] = json.loads(summary.read_text(encoding="utf-8"))
        runs[seed]["seconds"] = perf_counter() - start
        runs[seed]["ptx_over_ppo"] = _paired(summary.with_name("answers.jsonl"), "ppo_ptx", "ppo")
    evaluations = [run["evaluation"] for run in runs.values()]
    console.print(_table(evaluations))
    rows = [_row(seed, run) for seed, run in runs.items()]
    console.print(_checks(rows))
    console.print(_seconds(rows))
    for text, met in _targets(rows):
        console.print(f"{'met   ' if met else 'MISSED'} {text}", highlight=False)
    machine = {"machine": platform.platform(), "torch": torch.__version__}
    print(json.dumps({"config": str(config), "overrides": overrides or [], **machine, "seeds": rows}))


def _value(evaluation: Mapping[str, Any], measure: str, arm: str) -> float | None:
    found = evaluation.get(measure, {})
    cell = found.get(arm, found.get(f"{arm}_vs_sft"))
    return cell["value"] if isinstance(cell, Mapping) else cell


def _table(evaluations: Sequence[Mapping[str, Any]]) -> Table:
    """The mean of the seeds, and each seed's own in brackets."""
    arms = list(evaluations[0]["gold_mean"])
    table = Table(title=f"mean of {len(evaluations)} seeds (each), {evaluations[0]['prompts']} held-out prompts a seed")
    table.add_column("")
    for arm in arms:
        table.add_column(arm, justify="right")
    for measure, heading in MEASURES.items():
        cells = []
        for arm in arms:
            values = [v for e in evaluations if (v := _value(e, measure, arm)) is not None]
            each = " ".join(f"{v:.3f}" for v in values)
            cells.append(f"{fmean(values):.3f}\n({each})" if values else "-")
        table.add_row(heading, *cells)
    return table


def _row(seed: int, run: Mapping[str, Any]) -> dict[str, Any]:
    stages, evaluation = run["stages"], run["evaluation"]
    losses = evaluation["pretrain_loss"]
    return {
        "seed": seed,
        "sft_fully_right": evaluation["flags"]["sft"]["all"],
        "labeler_agreement": evaluation["reward_accuracy"]["labeler_agreement"],
        "ties": stages["collect"]["ties"],
        "reward_accuracy": evaluation["reward_accuracy"]["heldout"],
        "tax": losses["ppo"] - losses["sft"],
        "tax_left_with_ptx": losses["ppo_ptx"] - losses["sft"],
        "ptx_over_ppo": run["ptx_over_ppo"],
        "arms": {m: {a: _value(evaluation, m, a) for a in evaluation["gold_mean"]} for m in MEASURES},
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "command_seconds": run["seconds"],
    }


def _paired(answers: Path, arm: str, other: str) -> dict[str, Any]:
    """Gold win rate of one arm over another on the same prompts, with its 95 % interval."""
    rows = [json.loads(line)["answers"] for line in answers.read_text(encoding="utf-8").splitlines()]
    return win_rate([row[arm]["gold"] for row in rows], [row[other]["gold"] for row in rows], 2000, seed=0)


def _targets(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """What the demo is held to, in the mean of the seeds where not said otherwise."""

    def mean(value: Callable[[Mapping[str, Any]], float]) -> float:
        return fmean(value(row) for row in rows)

    wins = mean(lambda row: row["arms"]["gold_win_rate"]["ppo_ptx"])
    lowest = min(row["ptx_over_ppo"]["ci95"][1] for row in rows)
    kl = max(row["arms"]["kl_per_response"]["ppo_ptx"] for row in rows)
    gap = mean(lambda row: row["labeler_agreement"] - row["reward_accuracy"])
    tax, left = mean(lambda row: row["tax"]), mean(lambda row: row["tax_left_with_ptx"])
    return [
        (f"gold win rate of PPO-ptx over SFT {wins:.3f}, at least 0.72", wins >= 0.72),
        (f"PPO-ptx over PPO, upper end of the interval, any seed {lowest:.3f}, at least 0.5", lowest >= 0.5),
        (f"KL of PPO-ptx, any seed {kl:.2f} nats a response, at most 5", kl <= 5),
        (f"reward model {100 * gap:.1f} points below a labeler, at most 8", gap <= 0.08),
        (f"PPO raises the loss on text by {tax:.3f}, with text {left:+.3f}: at most half is left", 0 < tax >= 2 * left),
    ]


def _checks(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="what the world is like, and the alignment tax, by seed")
    names = [name for name, value in rows[0].items() if isinstance(value, float) and not name.endswith("seconds")]
    table.add_column("")
    for row in rows:
        table.add_column(f"seed {row['seed']}", justify="right")
    for name in names:
        table.add_row(name.replace("_", " "), *(f"{row[name]:.3f}" for row in rows))
    return table


def _seconds(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="seconds, by stage and of the command as a whole")
    table.add_column("seed", justify="right")
    for name in (*rows[0]["seconds"], "command"):
        table.add_column(name, justify="right")
    for row in rows:
        seconds = (*row["seconds"].values(), row["command_seconds"])
        table.add_row(str(row["seed"]), *(f"{value:.0f}" for value in seconds))
    return table


if __name__ == "__main__":
    typer.run(main)
