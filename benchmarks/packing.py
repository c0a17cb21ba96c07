"""Padded rows against packed ones: seconds of a forward and backward pass over the same sequences.

    python benchmarks/packing.py [--device cuda]

Alternates the two on models of several sizes; prints medians of 7 paired ratios, and JSON as its last line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import typer
from common import machine, paired_ratio, print_result, print_table, timed_in_turns

from rayrlhf.config.model import FromScratch
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample
from rayrlhf.engines.tasks import LanguageBatch, LanguageTask
from rayrlhf.models.build import PolicyModel, from_scratch

PAIRS = 7
# hidden size, layers, shortest and longest sequence
SHAPES = [(128, 4, 20, 80), (256, 5, 30, 384), (384, 4, 60, 512)]
VOCABULARY, SEQUENCES, TOKENS = 2048, 32, 4096


def main(device: str = "cpu", threads: int = 2) -> None:
    torch.set_num_threads(threads)
    rows = [_compare(*shape, torch.device(device)) for shape in SHAPES]
    print_table(f"{SEQUENCES} sequences in micro-batches of {TOKENS} tokens, forward and backward", rows)
    print_result({**machine(device), "rows": rows})


def _compare(hidden: int, layers: int, shortest: int, longest: int, device: torch.device) -> dict[str, Any]:
    spec = FromScratch(hidden_size=hidden, layers=layers, heads=hidden // 32, context=longest)
    model = from_scratch(spec, VOCABULARY, 0, 1, seed=0).to(device)
    rng = np.random.default_rng(0)
    lengths = rng.integers(shortest, longest + 1, SEQUENCES)
    examples = [LMExample(rng.integers(2, VOCABULARY, n).astype(np.int32), 0, "") for n in lengths]
    task = LanguageTask(examples)

    def side(packed: bool) -> Callable[[], None]:
        batches = task.cut(range(SEQUENCES), Cutting(TOKENS, packed), device)
        return partial(_pass, model, task, batches, task.denominator(range(SEQUENCES)))

    seconds = timed_in_turns({"padded": side(False), "packed": side(True)}, PAIRS)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": int(lengths.sum()),
        "padded_s": median(seconds["padded"]),
        "packed_s": median(seconds["packed"]),
        **paired_ratio("packed_over_padded", seconds["padded"], seconds["packed"]),
    }


def _pass(model: PolicyModel, task: LanguageTask, batches: Sequence[LanguageBatch], denominator: float) -> None:
    for batch in batches:
        task.loss(model, batch, denominator).backward()


if __name__ == "__main__":
    typer.run(main)
