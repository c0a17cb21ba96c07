"""A PPO run whose disk is full, and one whose learners are lost, with stand-ins for its actors."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayrlhf.checkpoint.ledger import Accounted
from rayrlhf.config import Config, load_config
from rayrlhf.errors import ActorError, ActorLost, CheckpointError, DataLost
from rayrlhf.stages import ppo
from rayrlhf.stages.saving import RECORDS, PolicySaver

LOST = ActorLost("policy rank 0 failed in update: the actor died")
LOST.role = "policy"
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "config.yaml").write_text("""
run: {name: run, output: out}
model: {from_scratch: {hidden_size: 16, layers: 1, heads: 2, context: 256}}
data: {text: [t.txt], demonstrations: [d.jsonl], rankings: [r.jsonl], prompts: [p.jsonl]}
ppo: {steps: 4, batch_size: 4, minibatch_size: 4}
checkpoint: {every: 1}
""")
    return load_config(tmp_path / "config.yaml", [], {})


class Learners:
    """Policy and value; `fail` is asked at each call."""

    def __init__(self, role: str, fail: Callable[[str], None] = lambda method: None) -> None:
        self.role, self.ranks, self._fail = role, 1, fail

    async def call(self, method: str, path: str) -> list[Any]:
        await asyncio.sleep(0)
        self._fail(method)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text(method)
        return [None]


def saver_of(config: Config, folder: Path, fail: Callable[[str], None] = lambda method: None) -> PolicySaver:
    tokenizer = SimpleNamespace(save_pretrained=lambda target: None)
    context: Any = SimpleNamespace(folder=folder, inputs={}, data=SimpleNamespace(tokenizer=tokenizer), console=None)
    for name in RECORDS:
        (folder / name).write_text("")
    groups: Any = {role: Learners(role, fail) for role in ("policy", "value")}
    saver = PolicySaver(groups, context, config, folder)
    saver.ledger = SimpleNamespace(accounted=Accounted())  # type: ignore[assignment]
    return saver


def in_an_actor(saver: PolicySaver, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(method: str) -> None:
        raise ActorError("value rank 0 failed in save_state: OSError: [Errno 28] No space left on device", "see logs")

    saver._groups["value"]._fail = full  # type: ignore[attr-defined]


def in_a_copy(saver: PolicySaver, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*of: Any) -> None:
        raise FULL

    monkeypatch.setattr("shutil.copy2", full)


def in_the_manifest(saver: PolicySaver, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*of: Any) -> None:
        raise FULL

    monkeypatch.setattr("os.fsync", full)


@pytest.mark.parametrize("fault", [in_an_actor, in_a_copy, in_the_manifest])
def test_a_disk_that_is_full_wherever_is_one_message_and_the_checkpoint_before_stays_whole(
    fault: Callable[..., None], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saver = saver_of(config, tmp_path)
    assert asyncio.run(saver.save(1, 0.1, {}))
    with monkeypatch.context() as patched:
        fault(saver, patched)
        with pytest.raises(
            CheckpointError, match=r"step 2 cannot be written to .*checkpoints.*No space left"
        ) as caught:
            asyncio.run(saver.save(2, 0.1, {}))
    assert "--resume: earlier checkpoints are as they were" in caught.value.hint
    newest = saver._store.newest()
    assert newest is not None
    assert newest.step == 1
    assert not list(tmp_path.glob("checkpoints/.step-*"))


@pytest.mark.parametrize("lost", [LOST, DataLost("its node is gone")])
def test_a_learner_that_is_lost_while_it_saves_is_lost_and_not_a_full_disk(
    lost: ActorError, config: Config, tmp_path: Path
):
    def fail(method: str) -> None:
        raise lost

    with pytest.raises(type(lost)):
        asyncio.run(saver_of(config, tmp_path, fail).save(1, 0.1, {}))


class Roles:
    """Notes what is replaced and reloaded."""

    def __init__(self) -> None:
        self.groups = {"policy": None, "value": None, "reward": None}
        self.log: list[str] = []

    async def replace(self, role: str, cause: ActorError) -> None:
        self.log.append(f"replace {role}")

    async def reload(self, role: str, config: Config) -> None:
        self.log.append(f"reload {role}")

    async def settled(self) -> None:
        self.log.append("settled")

    async def again(self, what: str, cause: ActorError) -> None:
        self.log.append(f"again: {what}")


class Arm(ppo._Arm):
    """Each loop, resume and final save ends with the next of its outcomes."""

    def __init__(self, resume: bool = False, **outcomes: list[Any]) -> None:
        self.roles: Any = Roles()
        self.context: Any = SimpleNamespace(resume=resume)
        self.progress: Any = SimpleNamespace(phase=lambda name: None)
        self.config: Any = None
        self.folder = Path("folder")
        self.outcomes = outcomes

    def next_of(self, name: str) -> Any:
        self.roles.log.append(name)
        outcome = self.outcomes[name].pop(0) if self.outcomes.get(name) else None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _loop(self, sink: Any, found: Any) -> None:
        self.next_of("loop")

    def _saver(self) -> Any:
        async def resume() -> Any:
            return self.next_of("resume")

        async def save_to(folder: Path) -> None:
            self.next_of("save")

        return SimpleNamespace(resume=resume, save_to=save_to)

    def until_done(self) -> list[str]:
        sink: Any = SimpleNamespace(roll_back=lambda step: None, write_again=lambda folder: None)
        asyncio.run(self._until_done(sink, reload=False))
        log: list[str] = self.roles.log
        return log


CHECKPOINT = SimpleNamespace(step=2, folder=Path("step-2"))


def test_a_learner_that_is_lost_while_the_models_are_written_at_the_end_costs_a_restart_not_the_run():
    log = Arm(save=[LOST]).until_done()
    assert log[:2] == ["loop", "save"]
    assert "replace policy" in log
    assert log[-2:] == ["loop", "save"]


def test_a_learner_that_is_lost_while_a_run_is_resumed_is_replaced():
    arm = Arm(resume=True)
    arm.outcomes = {"resume": [LOST, CHECKPOINT]}
    assert arm.until_done() == ["settled", "resume", "replace policy", "resume", "loop", "save"]


def test_before_a_step_is_done_again_all_that_is_being_replaced_is_there():
    arm = Arm()
    arm.outcomes = {"loop": [LOST], "resume": [CHECKPOINT]}
    log = arm.until_done()
    assert log == ["loop", "settled", "replace policy", "resume", "loop", "save"]


def test_lost_data_counts_towards_a_budget():
    arm = Arm()
    arm.outcomes = {"loop": [DataLost("its node is gone")], "resume": [CHECKPOINT]}
    assert arm.until_done() == ["loop", "settled", "again: data of the step", "resume", "loop", "save"]


def test_a_role_whose_memory_is_unknown_in_some_steps_is_summed_up_from_the_others():
    """It had died between the step's last call to it and this one."""
    rows = [
        {"reward/mean": 1.0, "time/step_s": 2.0, "memory/policy_gib": 1.0},
        {"reward/mean": 3.0, "time/step_s": 4.0, "memory/policy_gib": 2.0, "memory/reward_gib": 0.5},
        {"reward/mean": 5.0, "time/step_s": 6.0, "memory/reward_gib": 0.25},
    ]
    summary = ppo._summary(rows)
    assert summary["memory_gib"] == {"memory/policy_gib": 2.0, "memory/reward_gib": 0.5}
    assert summary["seconds_per_step"] == {"time/step_s": 4.0}
