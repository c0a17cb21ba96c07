"""Over-optimisation: PPO without a KL penalty for many steps, the proxy reward beside the gold score.

    python benchmarks/overoptimisation.py configs/demo.yaml --steps 120 --coefs 0,0.08 --seeds 0 [section.key=value ...]

One run, an arm per coefficient, from the same SFT and reward models (made first if they are not there yet). Draws both
against the KL to SFT, as Gao et al. 2023 (arXiv 2210.10760, figure 1) do, into <run>/overoptimisation-<seed>.svg;
prints a table; the last line is JSON.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from rayrlhf.config import load_config

WIDTH, HEIGHT, MARGIN = 640, 360, 56
WINDOW = 5
COLOURS = ("#c2410c", "#1d4ed8", "#047857", "#7c3aed")


def main(
    config: Path,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    steps: int = 120,
    coefs: str = "0,0.08",
    seeds: str = "0",
) -> None:
    """`coefs` (of the KL penalty) and `seeds` are separated by commas."""
    if steps < 2 * WINDOW:
        raise typer.BadParameter(f"--steps is {steps}: a point is the mean of {WINDOW} steps, and a curve needs two")
    console, rows = Console(), []
    asked = {f"kl_{coef.replace('.', '_')}": float(coef) for coef in coefs.split(",")}
    arms = ", ".join(f"{name}: {{kl.coef: {coef}, ptx.coef: 0}}" for name, coef in asked.items())
    for seed in map(int, seeds.split(",")):
        shared = [
            *(overrides or ()),
            f"run.seed={seed}",
            f"world.seed={seed}",
            f"run.name=overoptimisation-{seed}",
            f"ppo.steps={steps}",
        ]
        arguments = [str(config), *shared, f"ppo.arms={{{arms}}}", "run.stages=[pretrain,sft,collect,reward,ppo]"]
        subprocess.run([sys.executable, "-m", "rayrlhf.cli", "run", *arguments], check=True, stdout=sys.stderr)
        settings = load_config(config, arguments[1:])
        folder = settings.run.output / settings.run.name
        curves = {name: curve(folder / "metrics.jsonl", name) for name in asked}
        rows += [{"seed": seed, "coef": coef, **_summary(curves[name])} for name, coef in asked.items()]
        picture = folder / f"overoptimisation-{seed}.svg"
        picture.write_text(draw({f"KL coefficient {asked[name]:g}": c for name, c in curves.items()}), encoding="utf-8")
        console.print(f"drawn: {picture}", soft_wrap=True)
    console.print(_table(rows))
    machine = {"machine": platform.platform(), "torch": torch.__version__}
    print(json.dumps({"config": str(config), "overrides": overrides or [], "steps": steps, **machine, "rows": rows}))


def curve(metrics: Path, arm: str) -> list[tuple[float, float, float]]:
    """(KL, proxy, gold) of the arm's steps, each the mean of `WINDOW` steps."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [r for r in records if r["stage"] == "ppo" and r.get("arm", arm) == arm]
    rows = [(r["kl/mean"], r["reward/mean"], r["reward/gold"]) for r in steps]
    parts = [rows[i : i + WINDOW] for i in range(0, len(rows) - WINDOW + 1, WINDOW)]
    return [(fmean(p[0] for p in part), fmean(p[1] for p in part), fmean(p[2] for p in part)) for part in parts]


def _summary(points: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    best = max(range(len(points)), key=lambda i: points[i][2])
    return {
        "proxy_start": points[0][1],
        "proxy_end": points[-1][1],
        "gold_start": points[0][2],
        "gold_best": points[best][2],
        "gold_end": points[-1][2],
        "kl_at_best_gold": points[best][0],
        "kl_end": points[-1][0],
        # The proxy goes on rising after gold is at its best: how much, and what gold loses meanwhile.
        "proxy_gained_after_best_gold": points[-1][1] - points[best][1],
        "gold_lost_after_best": points[best][2] - points[-1][2],
    }


def draw(curves: dict[str, list[tuple[float, float, float]]]) -> str:
    """An SVG of proxy (dashed, left scale) and gold (solid, right scale) against the square root of KL."""
    points = [p for rows in curves.values() for p in rows]
    x = _scale([max(p[0], 0.0) ** 0.5 for p in points], MARGIN, WIDTH - MARGIN)
    proxy = _scale([p[1] for p in points], HEIGHT - MARGIN, MARGIN)
    gold = _scale([p[2] for p in points], HEIGHT - MARGIN, MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">KL to SFT, nats a response (root scale)</text>',
        f'<text x="{MARGIN}" y="24">proxy reward (dashed)</text>',
        f'<text x="{WIDTH - MARGIN}" y="24" text-anchor="end">gold score (solid)</text>',
    ]
    for number, (name, rows) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        for scale, column, dash in ((proxy, 1, "5 4"), (gold, 2, "none")):
            line = " ".join(f"{x(max(r[0], 0.0) ** 0.5):.1f},{scale(r[column]):.1f}" for r in rows)
            stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
            parts.append(f'<polyline points="{line}" fill="none" {stroke}/>')
        parts.append(f'<text x="{WIDTH / 2}" y="{24 + 15 * number}" text-anchor="middle" fill="{colour}">{name}</text>')
    for value, scale, place, anchor in _ticks(points, proxy, gold):
        parts.append(f'<text x="{place}" y="{scale(value) + 4:.1f}" text-anchor="{anchor}">{value:.2f}</text>')
    for kl in (end(max(p[0], 0.0) for p in points) for end in (min, max)):
        parts.append(f'<text x="{x(kl**0.5):.1f}" y="{HEIGHT - 34}" text-anchor="middle">{kl:.1f}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _scale(values: Sequence[float], low: float, high: float) -> Any:
    least, most = min(values), max(values)
    span = (most - least) or 1.0
    return lambda value: low + (value - least) / span * (high - low)


def _ticks(points: Sequence[tuple[float, float, float]], proxy: Any, gold: Any) -> list[tuple[float, Any, float, str]]:
    ends = [(column, scale, place, anchor) for column, scale, place, anchor in
            ((1, proxy, MARGIN - 8, "end"), (2, gold, WIDTH - MARGIN + 8, "start"))]  # fmt: skip
    return [(end(p[c] for p in points), s, place, anchor) for c, s, place, anchor in ends for end in (min, max)]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="over-optimisation")
    for heading in ("KL coef", "seed", "proxy", "gold: start, best, end", "KL at best gold, end"):
        table.add_column(heading, justify="right")
    for r in rows:
        table.add_row(
            f"{r['coef']:g}",
            str(r["seed"]),
            f"{r['proxy_start']:.2f} -> {r['proxy_end']:.2f}",
            f"{r['gold_start']:.3f}, {r['gold_best']:.3f}, {r['gold_end']:.3f}",
            f"{r['kl_at_best_gold']:.2f}, {r['kl_end']:.2f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
