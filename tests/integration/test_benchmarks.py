"""The benchmarks on sizes at which their numbers mean nothing: do they run, and do both sides do the same work?"""

from __future__ import annotations

import copy
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).parents[2] / "benchmarks"


def last_line(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, FOLDER / f"{script}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    arguments = ["--shapes=64x2,32x1", "--sequences=5", "--longest=64", "--rounds=3", "--threads=1"]
    return last_line("learner", *arguments)


def test_the_learners_last_line_has_positive_ratios_of_every_comparison(result: dict[str, Any]) -> None:
    first, second = result["rows"]
    against_plain = {"product_over_plain_ratio"}
    assert {k for k in first if k.endswith("_ratio")} == against_plain | {
        "packed_over_padded_ratio",
        "packed_over_padded_by_length_ratio",
    }
    assert {k for k in second if k.endswith("_ratio")} == against_plain, "padding is measured on the first shape"
    for row in result["rows"]:
        assert all(0 < row[k] < math.inf for k in row if k.endswith("_ratio"))
        assert all(row[k][0] <= row[k.replace("_range", "_ratio")] <= row[k][1] for k in row if k.endswith("_range"))
    assert {"machine", "cpus", "threads", "torch"} <= result.keys()


def test_product_and_plain_loop_find_the_same_loss_and_come_to_the_same_weights(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert row["loss_gap"] <= 1e-5
        assert row["weight_gap_in_rates"] <= 0.05


def test_padding_is_what_the_ways_of_cutting_differ_in(result: dict[str, Any]) -> None:
    row = result["rows"][0]
    assert row["tokens"] <= row["packed_cells"] <= row["padded_by_length_cells"] <= row["padded_cells"]


def test_a_ratio_is_the_median_of_the_rounds_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second round was slow for both sides: of medians the quotient would be 4 / 2."""
    monkeypatch.syspath_prepend(str(FOLDER))
    common = importlib.import_module("common")
    found = common.paired_ratio("a_over_b", [3.0, 90.0, 4.0], [2.0, 30.0, 1.0])
    assert found == {"a_over_b_ratio": 3.0, "a_over_b_range": [1.5, 4.0]}


def test_sides_that_differ_in_loss_or_weights_end_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    learner = importlib.import_module("learner")
    one = nn.Linear(3, 3)
    other = copy.deepcopy(one)
    assert learner.check_agreement(one, other, 2.0, 2.0) == {"loss_gap": 0.0, "weight_gap_in_rates": 0.0}
    with pytest.raises(SystemExit, match=r"losses 2\.0 and 2\.001"):
        learner.check_agreement(one, other, 2.0, 2.001)
    with torch.no_grad():
        other.bias[1] += learner.PPO.learning_rate
    with pytest.raises(SystemExit, match="learning rates apart"):
        learner.check_agreement(one, other, 2.0, 2.0)


@pytest.mark.slow
def test_the_publish_that_is_timed_is_a_whole_one() -> None:
    (row,) = last_line("weight_sync", "--sizes=4M", "--engines=1", "--rounds=1")["rows"]
    assert row["mib"] == pytest.approx(14.26, abs=0.01)
    parts = row["gather"] + row["transfer"] + row["load"] + row["probe"]
    # Hashing runs on both sides, and the policy's probe beside the engine's load.
    assert parts < row["publish"]
    assert row["publish_to_reload_ratio"] > 1, "it does what a reload does, and more"
    assert row["asked_reload"] > row["reload"], "a call to an actor takes time"
    assert row["moved_to_copy_ratio"] > 0.5, "a copy at the least, and both may be lucky"


@pytest.mark.slow
def test_engines_behind_actors_and_plain_ones_sample_the_same_tokens() -> None:
    """The benchmark itself counts each side's tokens."""
    fixed, long_tailed = last_line("rollout", "--engines=1", "--pairs=1", "--responses=6")["rows"]
    assert (fixed["tokens"], fixed["lengths"]) == (6 * 64, "fixed")
    assert long_tailed["lengths"] == "log-normal"
    for row in (fixed, long_tailed):
        assert row["system_to_plain_ratio"] == pytest.approx(row["system_tokens_per_s"] / row["plain_tokens_per_s"])


@pytest.mark.slow
def test_the_control_plane_of_stand_ins_overlaps_their_two_sides() -> None:
    found = last_line("control", "--actors=2", "--steps=3", "--memory-steps=3")
    assert found["sync_step_s"] > 1.1, "0.6 s of sampling and 0.5 s of learning, one after the other"
    assert 1.0 <= found["overlap_to_longer_side_ratio"] < found["sync_step_s"] / 0.6
    row = found["rows"][0]
    assert row["driver_cpu_ms"] == pytest.approx(row["driver_cpu_ms_per_step"] / 6), "2 engines, 4 model roles"
    assert 0 < found["health_step_ms"] < 10


@pytest.mark.slow
def test_a_ppo_step_and_the_plain_loop_beside_it_do_the_same_work() -> None:
    """The benchmark itself compares tokens and optimizer steps, and wants a first ratio of 1 of the loop."""
    (row,) = last_line("ppo_step", "--sizes=tiny", "--pairs=1", "--batch=8", "--longest=16")["rows"]
    assert row["response_tokens"] == 28
    for side in ("product_s", "plain_s"):
        phases = [seconds for phase, seconds in row[side].items() if phase != "step"]
        assert all(seconds >= 0 for seconds in phases)
        assert sum(phases) == pytest.approx(row[side]["step"], rel=1e-6), "every second of a step is some phase's"
    assert row["product_over_plain_ratio"] == pytest.approx(row["plain_s"]["step"] / row["product_s"]["step"])
