"""`rayrlhf bench`: finds the script, hands its options on, ends with its exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rayrlhf.errors import ConfigError
from rayrlhf.launch.bench import BENCHMARKS, run_benchmark

ROOT = Path(__file__).parents[3]


def test_every_benchmark_has_its_script() -> None:
    for script in BENCHMARKS.values():
        assert (ROOT / "benchmarks" / f"{script}.py").is_file()


def test_options_and_exit_code_are_the_scripts_own() -> None:
    command = [sys.executable, "-m", "rayrlhf.cli", "bench", "control"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert helped.returncode == 0
    wrong = subprocess.run([*command, "--no-such-option"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert wrong.returncode == 2
    assert "--no-such-option" in wrong.stderr


def test_an_unknown_benchmark_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="there is no rolout") as error:
        run_benchmark("rolout", [])
    assert error.value.hint == "one of ppo, rollout, learner, sync, control"
