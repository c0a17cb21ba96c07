"""`rayrlhf bench NAME`: the benchmarks of the checkout, each a script of its own that prints a table and JSON."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rayrlhf.errors import ConfigError

__all__ = ["BENCHMARKS", "run_benchmark"]

BENCHMARKS = {
    "ppo": "ppo_step",
    "rollout": "rollout",
    "learner": "learner",
    "sync": "weight_sync",
    "control": "control",
}


def run_benchmark(name: str, arguments: Sequence[str]) -> int:
    """Run a benchmark in a process of its own; returns its exit code.

    Raises:
        ConfigError: no benchmark of that name, or no checkout to find it in.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"bench: there is no {name}", f"one of {', '.join(BENCHMARKS)}")
    script = Path(__file__).parents[2] / "benchmarks" / f"{BENCHMARKS[name]}.py"
    if not script.is_file():
        raise ConfigError(
            f"bench: {script} is not there", "benchmarks are part of the source tree: run this in a checkout"
        )
    return subprocess.run([sys.executable, str(script), *arguments], check=False).returncode
