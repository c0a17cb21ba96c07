"""What is not an actor dies: a shard of an engine, Ray's head, a node. The rest of the cases: `make test-faults`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import fault_matrix
from tests.fault_matrix import SHAPES, STEPS, node_case, run_case
from tests.faults import started
from tests.integration.conftest import FinishedRun
from tests.integration.hosts import why_not
from tests.soak import ppo_command

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

CASES = {case.name: case for case in fault_matrix.CASES}


class Runs:
    """The two models that every run starts from, and runs in peace, one a shape."""

    def __init__(self, finished: FinishedRun, folder: Path) -> None:
        self.models = [str(finished.artifact(stage) / "model") for stage in ("sft", "reward")]
        self.folder = folder

    def command(self, folder: Path, shape: str) -> list[str]:
        return [*ppo_command(self.models[0], self.models[1], folder, STEPS, 0), *SHAPES[shape]]

    def in_peace(self, shape: str) -> Path:
        folder, log = self.folder / shape.replace(" ", "-") / "run", self.folder / "peace.log"
        if not folder.exists():
            with started(self.command(folder, shape), log) as process:
                assert process.wait(400) == 0, log.read_text()
        return folder


@pytest.fixture(scope="module")
def runs(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(finished, tmp_path_factory.mktemp("peace"))


def test_an_engine_that_loses_a_shard_is_replaced(runs: Runs, tmp_path: Path) -> None:
    case, folder = CASES["engine process killed in generate"], tmp_path / "run"
    done = run_case(case, runs.command(folder, case.shape), folder, runs.in_peace(case.shape), tmp_path / "log")
    assert len(done["recovery_s"]) == 1
    assert done["cause"][0].startswith("rollout rank 0 ")


@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_a_run_that_loses_its_head_says_so_saves_what_it_learned_and_goes_on_with_resume(
    fault: str, runs: Runs, tmp_path: Path
) -> None:
    case, folder = CASES[f"head {fault} in update"], tmp_path / "run"
    done = run_case(case, runs.command(folder, case.shape), folder, runs.in_peace(case.shape), tmp_path / "log")
    said = done["said"]
    assert "the Ray head is lost: nothing answers at 127.0.0.1:" in said
    assert re.search(
        r"ActorError: the Ray head is lost: stopped after step \d+, which is saved hint: go on with --resume", said
    )


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_an_engine_whose_node_dies_is_placed_on_another(runs: Runs, tmp_path: Path) -> None:
    done = node_case("killed", runs.models[0], runs.models[1], tmp_path, runs.in_peace("plain"))
    assert len(done["recovery_s"]) >= 1
    assert done["cause"][0].startswith("rollout rank 0 ")
