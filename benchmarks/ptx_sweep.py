"""What the PPO-ptx coefficient does: one PPO run per coefficient and seed, and what each did to the pretraining loss.

    python benchmarks/ptx_sweep.py configs/demo.yaml --coefs 0,1,27.8 --seeds 0 [section.key=value ...]

Each run starts from the same SFT and reward models (made first if they are not there yet). The pretraining loss is
that of held-out text, in nats per token, before PPO and after. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from rayrlhf.config import Config, load_config
from rayrlhf.data.prompts import LMExample
from rayrlhf.stages.datasets import Datasets
from rayrlhf.stages.world import with_world


def main(
    config: Path,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    coefs: str = "0,0.1,1,4,27.8,100",
    seeds: str = "0",
) -> None:
    """`coefs` and `seeds` are separated by commas."""
    console, rows = Console(), []
    for seed in map(int, seeds.split(",")):
        shared = [*(overrides or ()), f"run.seed={seed}"]
        start: float | None = None
        for coef in map(float, coefs.split(",")):
            arguments = [str(config), *shared, f"run.name=ptx-{coef:g}-{seed}", f"ppo.ptx.coef={coef}"]
            console.print(f"seed {seed}, coefficient {coef:g}")
            subprocess.run([sys.executable, "-m", "rayrlhf.cli", "run", *arguments], check=True, stdout=sys.stderr)
            settings = load_config(config, arguments[1:])
            folder = settings.run.output / settings.run.name
            heldout = _heldout(settings, folder)
            start = _loss(_parent(folder, settings), heldout) if start is None else start
            rows.append({"seed": seed, "coef": coef, "start": start, "end": _loss(folder / "model", heldout)})
            rows[-1] |= _end_of(folder)
    console.print(_table(rows))
    machine = {"machine": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"config": str(config), "overrides": overrides or [], **machine, "rows": rows}))


def _heldout(config: Config, folder: Path) -> list[LMExample]:
    data = Datasets(with_world(config), str(folder / "model"))
    return data.pretrain.heldout


def _parent(folder: Path, config: Config) -> Path:
    """The SFT model that PPO started from."""
    stages = json.loads((folder / "summary.json").read_text())["stages"]
    return config.run.output / "artifacts" / f"sft-{stages['sft']['key']}" / "model"


def _loss(model: Path, blocks: list[LMExample]) -> float:
    """Mean negative log-likelihood per token."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        tokens = torch.from_numpy(np.stack([b.tokens for b in blocks])).long()
        return fmean(float(lm(input_ids=part, labels=part).loss) for part in tokens.split(1))


def _end_of(folder: Path) -> dict[str, Any]:
    """Means over the last quarter of the steps."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["stage"] == "ppo"]
    last = steps[-max(1, len(steps) // 4) :]
    names = ("reward/mean", "kl/mean", "policy/entropy", "policy/clip_fraction", "response/length_mean")
    result = {name: fmean(s[name] for s in last) for name in names}
    result["policy/grad_norm"] = fmean(s["policy/grad_norm"] for s in steps)
    for name in ("policy/ppo_grad_norm", "ptx/grad_norm"):
        measured = [s[name] for s in steps if name in s]
        result[name] = fmean(measured) if measured else None
    return result


def _table(rows: list[dict[str, Any]]) -> Table:
    columns = {
        "coef": lambda r: f"{r['coef']:g}",
        "seed": lambda r: str(r["seed"]),
        "reward": lambda r: f"{r['reward/mean']:.2f}",
        "KL": lambda r: f"{r['kl/mean']:.2f}",
        "length": lambda r: f"{r['response/length_mean']:.1f}",
        "entropy": lambda r: f"{r['policy/entropy']:.2f}",
        "text": lambda r: f"{r['start']:.3f}",
        "after": lambda r: f"{r['end']:.3f}",
        "PPO norm": lambda r: "-" if r["policy/ppo_grad_norm"] is None else f"{r['policy/ppo_grad_norm']:.2f}",
        "ptx norm": lambda r: "-" if r["ptx/grad_norm"] is None else f"{r['ptx/grad_norm']:.2f}",
    }
    table = Table(title="PPO-ptx by coefficient")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    return table


if __name__ == "__main__":
    typer.run(main)
