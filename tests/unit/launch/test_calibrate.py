"""What is fitted foresees what it was fitted to: seconds made by the plan give the plan's own assumptions back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rayrlhf.config import load_config
from rayrlhf.errors import ConfigError
from rayrlhf.launch.calibrate import PROMPT, RESPONSE, SEQUENCES, SPECS, Measured, fitted, measure_this_machine
from rayrlhf.launch.calibrate import write_hardware as write
from rayrlhf.planning.hardware import hardware_named
from rayrlhf.planning.shapes import from_scratch_config, shape_of

ROOT = Path(__file__).parents[3]
CPU = hardware_named("cpu")
# The larger model's parameters: layers of attention, MLP and two norms; the embedding, which is the head; a norm.
LARGE = 6 * (4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512) + 2048 * 512 + 512
SLOWER = 0.05 / (0.02 + 4 * LARGE / 2e9)
# Of its cores that the plan gives an engine.
CPU_SHARE = 0.85


def made_up() -> Measured:
    """100 GFLOPS scoring, 50 learning; 5 ms a pass, 8 GB/s of Adam. Of an engine that has its share of the cores 40
    GFLOPS, 3 ms a step and 0.1 a sequence. 50 ms a publish."""
    score, update, prefill, decode = {}, {}, {}, {}
    for name, spec in SPECS.items():
        shape = shape_of(from_scratch_config(spec), name)
        attention = 4 * shape.heads * shape.head_dim * shape.layers
        for n in SEQUENCES:
            tokens, asked = n * (PROMPT + RESPONSE), n * RESPONSE
            flops = tokens * (2 * shape.multiplied + attention * (PROMPT + RESPONSE)) + asked * 2 * shape.head
            score[name, n] = 0.005 + flops / 100e9
            update[name, n] = 0.010 + 3 * flops / 50e9 + 32 * shape.parameters / 8e9
            one = n * (2 * shape.multiplied + attention * (PROMPT + RESPONSE / 2) + 2 * shape.head)
            # The larger model is the last. Memory as the plan assumes it of two threads: half of 24 GB/s.
            decode[n] = (0.003 + n * 0.0001 + max(4 * (shape.in_layers + shape.head) / 12e9, one / 40e9)) / CPU_SHARE
            prompts = n * PROMPT * (2 * shape.multiplied + attention * PROMPT / 2) + n * 2 * shape.head
            prefill[n] = prompts / 40e9 / CPU_SHARE
    return Measured(score, update, prefill, decode, publish=0.05)


def test_the_fit_finds_what_made_the_seconds() -> None:
    """Of 2 threads at the table's 0.1 TFLOPS and 12 GB/s each; an engine of 2 as well."""
    found = fitted(made_up(), CPU, learner_threads=2, engine_threads=2)
    expected = {
        "mfu_forward": 100e9 / 0.2e12,
        "mfu_train": 50e9 / 0.2e12,
        "micro_batch_ms": 5.0,
        "optimizer_bandwidth": 8 / 24,
        "decode_flops": 40e9 / 0.2e12,
        "decode_step_ms": 3.0,
        "decode_sequence_us": 100.0,
        "decode_bandwidth": 0.5,
        # Assumed are 20 ms and 2 GB/s; both take as much longer as the whole did.
        "publish_fixed_s": 0.02 * SLOWER,
        "publish_gb_s": 2.0 / SLOWER,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_no_share_is_negative_whatever_was_measured() -> None:
    measured = made_up()
    noisy = {case: seconds * (3 if case[0] == "small" else 1) for case, seconds in measured.score.items()}
    found = fitted(replace(measured, score=noisy), CPU, 1, 1)
    assert all(value >= 0 for value in found.values())


def test_what_is_written_is_hardware_for_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "this-machine.yaml"
    write(path, CPU, {"mfu_train": 0.25})
    again = hardware_named(str(path))
    assert again.assumptions == {"mfu_train": 0.25}
    assert again.flops("float32") == CPU.flops("float32")


def test_a_gpu_is_not_calibrated() -> None:
    config = load_config(ROOT / "configs/tiny.yaml", ["cluster.device=cuda"], {})
    with pytest.raises(ConfigError, match="measures this machine's CPU"):
        measure_this_machine(config, None)
