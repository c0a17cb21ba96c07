"""What the PPO-ptx coefficient does: an arm per coefficient, and what each did to reward and pretraining loss.

    python benchmarks/ptx_sweep.py configs/demo.yaml --coefs 0,1,27.8 --seeds 0 [section.key=value ...]

All arms of a seed start from the same SFT and reward models (made first if they are not there yet). The pretraining
loss is that of held-out text, in nats per token, of the SFT model and after PPO. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from rayrlhf.config import load_config

METRICS = ("reward/mean", "reward/gold", "kl/mean", "policy/entropy", "policy/clip_fraction", "response/length_mean")


def main(
    config: Path,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    coefs: str = "0,0.1,1,4,27.8,100",
    seeds: str = "0",
) -> None:
    """`coefs` and `seeds` are separated by commas."""
    console, rows = Console(), []
    named = {f"ptx_{coef.replace('.', '_')}": float(coef) for coef in coefs.split(",")}
    arms = ", ".join(f"{name}: {{ptx.coef: {coef}}}" for name, coef in named.items())
    for seed in map(int, seeds.split(",")):
        shared = [
            *(overrides or ()),
            f"run.seed={seed}",
            f"world.seed={seed}",
            f"run.name=ptx-sweep-{seed}",
            f"ppo.arms={{{arms}}}",
        ]
        arguments = [str(config), *shared, "run.stages=[pretrain,sft,collect,reward,ppo,eval]", "eval.best_of=1"]
        subprocess.run([sys.executable, "-m", "rayrlhf.cli", "run", *arguments], check=True, stdout=sys.stderr)
        settings = load_config(config, arguments[1:])
        folder = settings.run.output / settings.run.name
        evaluation = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["evaluation"]
        losses: Mapping[str, float] = evaluation["pretrain_loss"]
        for name, coef in named.items():
            wins = evaluation.get("gold_win_rate", {}).get(f"{name}_vs_sft", {}).get("value")
            row = {"seed": seed, "coef": coef, "start": losses["sft"], "end": losses[name], "gold_win_rate": wins}
            rows.append(row | _end_of(folder / "metrics.jsonl", name))
    console.print(_table(rows))
    machine = {"machine": platform.platform(), "torch": torch.__version__}
    print(json.dumps({"config": str(config), "overrides": overrides or [], **machine, "rows": rows}))


def _end_of(metrics: Path, arm: str) -> dict[str, Any]:
    """Means over the last quarter of the arm's steps; of the gradient norms over all that were measured."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [r for r in records if r["stage"] == "ppo" and r.get("arm", arm) == arm]
    last = steps[-max(1, len(steps) // 4) :]
    result: dict[str, Any] = {name: fmean(s[name] for s in last) for name in METRICS if name in last[0]}
    for name in ("policy/grad_norm", "policy/ppo_grad_norm", "ptx/grad_norm"):
        measured = [s[name] for s in steps if s.get(name) is not None]
        result[name] = fmean(measured) if measured else None
    return result


def _shown(name: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "-" if row.get(name) is None else f"{row[name]:.{digits}f}"


def _table(rows: list[dict[str, Any]]) -> Table:
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "coef": lambda r: f"{r['coef']:g}",
        "seed": lambda r: str(r["seed"]),
        "reward": _shown("reward/mean", 2),
        "gold": _shown("reward/gold", 3),
        "wins": _shown("gold_win_rate", 3),
        "KL": _shown("kl/mean", 2),
        "text": _shown("start", 3),
        "after": _shown("end", 3),
        "PPO norm": _shown("policy/ppo_grad_norm", 2),
        "ptx norm": _shown("ptx/grad_norm", 2),
    }
    table = Table(title="PPO-ptx by coefficient")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    return table


if __name__ == "__main__":
    typer.run(main)
