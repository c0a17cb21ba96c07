"""`rayrlhf plan --calibrate` on the real engines of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.integration.conftest import rayrlhf, shared_memory

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

MEASURED = {
    "micro_batch_ms",
    "mfu_forward",
    "mfu_train",
    "optimizer_bandwidth",
    "decode_flops",
    "decode_step_ms",
    "decode_sequence_us",
    "decode_bandwidth",
    "publish_fixed_s",
    "publish_gb_s",
}


def test_a_plan_rests_on_what_was_measured_here_and_a_later_one_on_its_file(tmp_path: Path) -> None:
    before = shared_memory()
    output = f"run.output={tmp_path}"
    measured = rayrlhf("plan", "configs/tiny.yaml", output, "--calibrate", "--json")
    assert measured.returncode == 0, measured.stderr
    plan, file = json.loads(measured.stdout), tmp_path / "this-machine.yaml"
    written = yaml.safe_load(file.read_text())["assumptions"]
    assert set(written) == MEASURED
    # Orders of magnitude of any machine that runs this: a wrong unit would be a thousand off.
    assert 1e9 < written["mfu_train"] * 0.1e12 < 1e13, "of the 0.1 TFLOPS of a core that the file says"
    assert 0.001 < written["publish_fixed_s"] < 1
    assert 0.05 < written["publish_gb_s"] < 50
    assert {name: plan["assumptions"][name]["value"] for name in written} == pytest.approx(written)

    again = rayrlhf("plan", "configs/tiny.yaml", output, "--hardware", str(file), "--json")
    assert json.loads(again.stdout)["step_seconds"] == plan["step_seconds"]
    plain = rayrlhf("plan", "configs/tiny.yaml", output, "--json")
    assert json.loads(plain.stdout)["step_seconds"] != plan["step_seconds"]
    assert shared_memory() <= before
