"""PPO with real engines on GPUs, by every transport: runs that end have passed their own probes and fingerprints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.whole_runs import RUNS, STEPS, arguments

ROOT = Path(__file__).parents[2]
PATIENCE_S = 900.0


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_ends_with_engines_and_learners_that_agree(name: str, tmp_path: Path) -> None:
    needed = RUNS[name][0]
    if torch.cuda.device_count() < needed:
        pytest.skip(f"{needed} GPUs are needed, {torch.cuda.device_count()} are here")
    command = [sys.executable, "-c", "import sys; from rayrlhf.cli import main; sys.exit(main())", "run"]
    done = subprocess.run(
        [*command, str(ROOT / "configs" / "tiny.yaml"), *arguments(name, tmp_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["stage"] == "ppo"]
    assert len(steps) == STEPS
    # The same weights on both sides: float32 to rounding, bfloat16 within its own.
    largest = 0.05 if "bfloat16" in name else 1e-3
    assert steps[0]["rollout/logprob_gap"] <= largest
    versions = [record["weights/version"] for record in steps]
    assert versions == sorted(set(versions))
