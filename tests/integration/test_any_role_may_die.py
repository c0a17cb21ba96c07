"""Each role is killed once in a running PPO; the run ends as the one that nothing happened to, bit by bit."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults import kill_in_next_call, recoveries, send_within, started, wait_until
from tests.integration.conftest import FinishedRun, rayrlhf
from tests.integration.test_resume import arguments, learned, whole

__all__ = ["whole"]
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

# Who is killed, what it is called in the run's records, and in which calls that may be. The learners are restored after
# the policy's death, so the value model may meet its own there.
DEATHS = {
    "RolloutActor": ("rollout-0", {"generate", "load_bucket", "verify"}),
    "RewardActor": ("reward", {"score"}),
    "ReferenceActor": ("reference", {"score"}),
    "PolicyActor": ("policy", {"score", "estimate", "update", "start_publish", "probe", "save", "save_state"}),
    "ValueActor": ("value", {"load_state", "score", "update", "save", "save_state"}),
}


def replaced(folder: Path, who: str) -> bool:
    return any(r["who"] == who and r["event"] == "replaced" for r in recoveries(folder))


def test_a_run_in_which_every_role_dies_once_is_the_run_in_which_none_did(
    whole: Path, finished: FinishedRun, tmp_path: Path
) -> None:
    run, folder, log = arguments(finished, tmp_path, "deaths"), tmp_path / "deaths", tmp_path / "log"
    with started(["ppo", *run], log) as process:
        wait_until((folder / "ledger.jsonl").exists, process)  # its actors have started
        for name, (who, _) in DEATHS.items():
            kill_in_next_call(process.pid, name)
            wait_until(lambda who=who: replaced(folder, who), process)
        assert process.wait(200) == 0, log.read_text()
    lost = {r["who"]: r["cause"] for r in recoveries(folder) if r["event"] == "lost"}
    assert lost.keys() == {who for who, _ in DEATHS.values()}
    for who, calls in DEATHS.values():
        assert re.fullmatch(r"\S+ rank 0 failed in (\w+): the actor died", lost[who])[1] in calls  # type: ignore[index]
    assert [record["step"] for record in learned(folder)] == [1, 2, 3, 4]
    assert learned(folder) == learned(whole)
    audit = rayrlhf("audit", str(folder))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    for model in ("model", "model_ema"):
        mine, other = (load_file(f / model / "model.safetensors") for f in (folder, whole))
        assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.slow
def test_a_role_that_dies_on_its_way_up_is_replaced_and_one_that_hangs_is_found_and_shows_its_stack(
    finished: FinishedRun, tmp_path: Path
) -> None:
    run = arguments(finished, tmp_path, "hangs", "cluster.recovery.hang_floor_s=4")
    folder, log = tmp_path / "hangs", tmp_path / "log"
    with started(["ppo", *run], log) as process:
        send_within(process.pid, "ReferenceActor", "start", signal.SIGKILL)
        wait_until((folder / "checkpoints" / "step-000001").exists, process)  # calls have come back by now
        send_within(process.pid, "RolloutActor", "generate", signal.SIGSTOP)
        wait_until(lambda: replaced(folder, "rollout-0"), process)
        assert process.wait(200) == 0, log.read_text()
    lost = {r["who"]: r["cause"] for r in recoveries(folder) if r["event"] == "lost"}
    assert lost.keys() == {"reference", "rollout-0"}
    assert lost["reference"] == "reference rank 0 failed in start: the actor died"
    cause = lost["rollout-0"]
    assert "rollout rank 0 did not finish generate within" in cause
    assert "it is in File" in cause
    assert "vllm" in cause


@pytest.mark.slow
def test_an_actor_that_may_not_be_replaced_ends_the_run_with_a_checkpoint(
    finished: FinishedRun, tmp_path: Path
) -> None:
    run = arguments(finished, tmp_path, "spent", "cluster.recovery.max_restarts=0", "checkpoint.every=100")
    folder, log = tmp_path / "spent", tmp_path / "log"
    with started(["ppo", *run], log) as process:
        wait_until(lambda: (folder / "metrics.jsonl").exists() and learned(folder), process)
        kill_in_next_call(process.pid, "RewardActor")
        assert process.wait(200) == 1
    said = " ".join(log.read_text().split())
    for words in ("reward was lost once", "reward rank 0 failed in score: the actor died", "reward-0.log", "--resume"):
        assert words in said
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == learned(folder)[-1]["step"]
