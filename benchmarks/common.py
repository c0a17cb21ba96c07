"""What benchmarks share: sides timed in turns, medians of paired ratios, the table, the machine, the last line."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rayrlhf.engines.vllm import EngineSettings

__all__ = ["engine_settings", "machine", "paired_ratio", "print_result", "print_table", "timed_in_turns"]


def timed_in_turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, one a round; a round before them warms up.

    Every round runs all sides, one after the other, so that what else the machine does meets all of them; every other
    round in reverse, so that none is always the first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(sides):
            start = perf_counter()
            sides[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(perf_counter() - start)
    return seconds


def paired_ratio(name: str, over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """`<name>_ratio`, the median of the quotients round by round, and `<name>_range`, the least and the largest.

    Not the quotient of medians: what slows one round down slows both sides of it.
    """
    quotients = [a / b for a, b in zip(over, under, strict=True)]
    return {f"{name}_ratio": median(quotients), f"{name}_range": [min(quotients), max(quotients)]}


def machine(device: str) -> dict[str, Any]:
    """What a benchmark of torch in this process ran on."""
    facts = {"machine": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def engine_settings(folder: str, context: int, max_tokens: int, max_sequences: int, threads: int) -> EngineSettings:
    """A float32 engine on the CPU for the model in `folder`."""
    return EngineSettings(
        model=folder,
        dtype="float32",
        device="cpu",
        context=context,
        max_tokens=max_tokens,
        temperature=1.0,
        tensor_parallel=1,
        threads=threads,
        kv_cache_gib=1,
        gpu_memory_utilization=0.5,
        max_sequences=max_sequences,
        transport="shared_memory",
        run="bench",
        eos=0,
        trust_remote_code=False,
        deterministic=False,
    )


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A column for each key of the rows, which all have the same."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(_shown, row.values()))
    Console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_shown, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_result(result: Mapping[str, Any]) -> None:
    """The last line of stdout, as JSON; ratios have keys that end in `_ratio`."""
    print(json.dumps(result))
    sys.stdout.flush()
