"""Padded rows against packed ones: seconds of a forward and backward pass over the same sequences.

    python benchmarks/packing.py [--device cuda]

Alternates the two on models of several sizes; prints medians of 7 paired ratios, and JSON as its last line.
"""

from __future__ import annotations

import json
import platform
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from rayrlhf.config.model import FromScratch
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample
from rayrlhf.engines.tasks import LanguageTask
from rayrlhf.models.build import PolicyModel, from_scratch

PAIRS = 7
# hidden size, layers, shortest and longest sequence
SHAPES = [(128, 4, 20, 80), (256, 5, 30, 384), (384, 4, 60, 512)]
VOCABULARY, SEQUENCES, TOKENS = 2048, 32, 4096


def main(device: str = "cpu", threads: int = 2) -> None:
    torch.set_num_threads(threads)
    rows = [_compare(*shape, torch.device(device)) for shape in SHAPES]
    table = Table(title=f"{SEQUENCES} sequences in micro-batches of {TOKENS} tokens, forward and backward")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    machine = {"machine": platform.platform(), "device": device, "threads": threads, "torch": torch.__version__}
    print(json.dumps({**machine, "rows": rows}))


def _compare(hidden: int, layers: int, shortest: int, longest: int, device: torch.device) -> dict[str, Any]:
    spec = FromScratch(hidden_size=hidden, layers=layers, heads=hidden // 32, context=longest)
    model = from_scratch(spec, VOCABULARY, 0, 1, seed=0).to(device)
    rng = np.random.default_rng(0)
    lengths = rng.integers(shortest, longest + 1, SEQUENCES)
    examples = [LMExample(rng.integers(2, VOCABULARY, n).astype(np.int32), 0, "") for n in lengths]
    task, seconds = LanguageTask(examples), {False: list[float](), True: list[float]()}
    for _ in range(PAIRS + 1):  # the first pair warms up
        for packed, times in seconds.items():
            times.append(_seconds(model, task, Cutting(TOKENS, packed), device))
    ratios = [padded / packed for padded, packed in zip(seconds[False][1:], seconds[True][1:], strict=True)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": int(lengths.sum()),
        "padded_s": median(seconds[False][1:]),
        "packed_s": median(seconds[True][1:]),
        "padded_over_packed_ratio": median(ratios),
    }


def _seconds(model: PolicyModel, task: LanguageTask, cutting: Cutting, device: torch.device) -> float:
    batches = task.cut(range(SEQUENCES), cutting, device)
    denominator = task.denominator(range(SEQUENCES))
    start = perf_counter()
    for batch in batches:
        task.loss(model, batch, denominator).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
