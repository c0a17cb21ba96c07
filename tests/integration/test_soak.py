"""Twenty steps with a fault every few; `make soak` has two hundred, and three seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import started
from tests.integration.conftest import FinishedRun, rayrlhf
from tests.soak import ppo_command, records, same_numbers, soak

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 20


def test_a_run_with_a_fault_every_few_steps_ends_as_the_one_in_peace_and_leaves_nothing(
    finished: FinishedRun, tmp_path: Path
) -> None:
    models = [str(finished.artifact(stage) / "model") for stage in ("sft", "reward")]
    peace, faulty = tmp_path / "peace" / "run", tmp_path / "faults" / "run"
    with started(ppo_command(*models, peace, STEPS, 0), tmp_path / "peace.log") as process:
        assert process.wait(400) == 0, (tmp_path / "peace.log").read_text()
    report = soak(ppo_command(*models, faulty, STEPS, 0), faulty, STEPS, 5, 0, tmp_path / "faults.log")
    assert report.faults.total() >= 3, report.faults
    assert len(records(faulty)) == STEPS
    assert same_numbers(peace, faulty) == []
    audit = rayrlhf("audit", str(faulty))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert report.left == []
    early, late = report.files
    assert late <= early + 20
