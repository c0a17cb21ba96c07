"""`make gpu-check` without a GPU: a table that skips everything and says why, JSON at its end, exit code 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_without_a_gpu_every_check_is_skipped_with_the_reason() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    names = [check["check"] for check in report["checks"]]
    assert names == ["matmul", "copies", "flash-attention", "nccl", "learner", "learner-offloaded", "vllm", "tests"]
    for check in report["checks"]:
        assert check["status"] == "skipped"
        assert check["reason"].startswith("no CUDA device")
        assert check["check"] in done.stdout
    assert {"driver", "CUDA", "torch", "vllm", "deepspeed", "flash-attn"} <= set(report["versions"])
    assert done.stdout.count("skipped: no CUDA device") == len(names)
