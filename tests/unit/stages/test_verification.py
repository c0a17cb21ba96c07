"""`--verify-step`: what is refused before anything starts, and what comes of the comparison."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import rayrlhf.stages.verification
from rayrlhf.actors.roles import UpdateRecord
from rayrlhf.config import load_config
from rayrlhf.driver.protocols import ExperienceBatch, RolloutBatch, ScoredBatch
from rayrlhf.errors import ActorError, ActorLost, ConfigError, TrainingError
from rayrlhf.evaluation.agreement import Row
from rayrlhf.models.build import NORMALISATION_KEY
from rayrlhf.stages.preflight import check_verify_step
from rayrlhf.stages.verification import VerifiedLearners
from rayrlhf.types import StepReport

ROOT = Path(__file__).parents[3]


def config(*overrides: str) -> Any:
    return load_config(ROOT / "configs/tiny.yaml", overrides, {})


@pytest.mark.parametrize(
    ("step", "overrides", "named"),
    [
        (21, [], "ppo.steps is 20"),
        (1, ["run.stages=[sft]"], "run.stages has no ppo"),
        (3, ["ppo.value_warmup_steps=3"], "ppo.value_warmup_steps"),
        (1, ["ppo.advantage=leave_one_out", "ppo.samples_per_prompt=4"], "ppo.advantage is leave_one_out"),
        (1, ["ppo.score.normalize=batch"], "ppo.score.normalize is batch"),
        (1, ["ppo.score.clip=5.0"], "ppo.score.clip is 5.0"),
        (1, ["ppo.truncated={treatment: penalty, value: 1.0}"], "ppo.truncated.treatment is penalty"),
        (1, ["ppo.old_logprobs=rollout", "ppo.importance_cap=2.0"], "ppo.old_logprobs is rollout"),
        (1, ["ppo.importance_cap=2.0"], "ppo.importance_cap is 2.0"),
        (1, ["ppo.dual_clip=3.0"], "ppo.dual_clip is 3.0"),
        (1, ["ppo.kl.stop=1.0"], "ppo.kl.stop is 1.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_what_the_reference_does_not_cover_is_refused_by_key(step: int, overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match="--verify-step") as refused:
        check_verify_step(config(*overrides), step)
    assert named in str(refused.value)
    assert refused.value.hint


@pytest.mark.parametrize("step", [1, 20])
def test_any_step_of_plain_ppo_and_ppo_ptx_can_be_compared(step: int) -> None:
    check_verify_step(config(), step)
    check_verify_step(config("ppo.ptx.coef=1.0", "ppo.kl.target=6.0", "ppo.epochs=2", "ppo.kl.kind=k3"), step)


class Group:
    ranks = 1

    def __init__(self, role: str, notes: list[str]) -> None:
        self.role, self.notes = role, notes

    async def call(self, method: str, folder: str) -> list[Any]:
        self.notes.append(f"{self.role} {method}")
        Path(folder).mkdir(exist_ok=True)
        return [7 if method == "record_before" else None]


class Learners:
    last = UpdateRecord([[2, 1]], None, {"policy": 0.1, "value": 0.2})

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    async def estimate(self, batch: ScoredBatch, kl_coef: float) -> ExperienceBatch:
        return ExperienceBatch((), ("e",), {}, [])

    async def update(self, experience: ExperienceBatch, step: int) -> StepReport:
        self.notes.append(f"update {step}")
        return StepReport({"policy/loss": 0.5}, 0.0, 2)


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    folder = tmp_path / "reward"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", NORMALISATION_KEY: [0.25, 2.0]}))
    return folder


def run(
    rows: list[Row], folder: Path, reward: Path, monkeypatch: pytest.MonkeyPatch, lost: Sequence[ActorError] = ()
) -> tuple[list[str], Any]:
    """Three steps of a run that compares the second: (who was called, what the reference was given)."""
    notes: list[str] = []
    given: list[Any] = []
    errors = list(lost)

    async def verify(*arguments: Any) -> list[Row]:
        notes.append("verify")
        given.append(arguments)
        if errors:
            raise errors.pop()
        return rows

    async def again(what: str, cause: ActorError) -> None:
        notes.append(f"{what}: {cause.message}")

    monkeypatch.setattr(rayrlhf.stages.verification, "verify", verify)
    console = Console(file=open(folder / "console.txt", "w", encoding="utf-8"), width=120)  # noqa: SIM115
    context: Any = SimpleNamespace(
        config=config(), folder=folder, console=console, verify_step=2, log=lambda name: f"{name}.log"
    )
    groups: Any = {role: Group(role, notes) for role in ("policy", "value")}
    learners: Any = Learners(notes)
    parents = {"sft": "the sft model", "reward": str(reward)}
    roles: Any = SimpleNamespace(groups=groups, again=again)
    verified = VerifiedLearners(context, parents, roles, learners, None, lambda phase: None)

    async def steps() -> None:
        for step in range(3):
            batch = ScoredBatch(RolloutBatch((), (f"r{step}",)), (f"s{step}",), step)
            await verified.update(await verified.estimate(batch, 0.2 + step), step)

    try:
        asyncio.run(steps())
    finally:
        console.file.close()
    return notes, given[0]


def test_one_step_is_recorded_around_its_update_and_compared(
    tmp_path: Path, reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row("values", 1e-6, 1e-4, "absolute", None), Row("value gradients", 2e-6, 1e-4, "of largest entry", None)]
    notes, (snapshot, batch, *_) = run(rows, tmp_path, reward, monkeypatch)
    before, after = (
        [f"{r} record_before" for r in ("policy", "value")],
        [f"{r} record_after" for r in ("policy", "value")],
    )
    assert notes == ["update 0", *before, "update 1", *after, "verify", "update 2"]
    assert (batch.rollouts.handles, batch.scores) == (("r1",), ("s1",))
    assert snapshot.recipe.kl_coef == pytest.approx(1.2)
    assert snapshot.recipe.normalisation == (0.25, 2.0)
    assert snapshot.adam_steps == {"policy": 7, "value": 7}
    assert snapshot.models["policy"] == snapshot.models["reference"] == "the sft model"
    assert snapshot.models["value"] == snapshot.models["reward"] == str(reward)
    assert "value gradients │     2.0e-06 │    0.0001 │ of largest entry │ ok" in (tmp_path / "console.txt").read_text()
    report = json.loads((tmp_path / "verify-step-2.json").read_text())
    assert report["agrees"] is True
    assert [row["quantity"] for row in report["rows"]] == ["values", "value gradients"]
    assert not (tmp_path / "verify-step-2").exists()


def test_a_step_is_compared_again_after_an_attempt_in_which_a_learner_was_lost(
    tmp_path: Path, reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "verify-step-2" / "policy").mkdir(parents=True)
    (tmp_path / "verify-step-2" / "policy" / "left").touch()
    run([Row("values", 1e-6, 1e-4, "absolute", None)], tmp_path, reward, monkeypatch)
    assert not (tmp_path / "verify-step-2").exists()


def test_a_reference_trainer_that_is_lost_is_asked_again(
    tmp_path: Path, reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row("values", 1e-6, 1e-4, "absolute", None)]
    notes, _ = run(rows, tmp_path, reward, monkeypatch, [ActorLost("its process died")])
    assert notes[-4:] == ["verify", "reference-trainer: its process died", "verify", "update 2"]


def test_a_difference_stops_the_run_names_the_first_and_keeps_the_snapshot(
    tmp_path: Path, reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        Row("values", 1e-6, 1e-4, "absolute", None),
        Row("policy gradients", float("inf"), 1e-4, "of largest entry", "model.norm.weight"),
        Row("policy weights", 5.0, 2.0, "rates", "lm_head.weight"),
    ]
    with pytest.raises(
        TrainingError, match=r"in policy gradients, first in model\.norm\.weight: off by up to inf"
    ) as stop:
        run(rows, tmp_path, reward, monkeypatch)
    assert str(tmp_path / "verify-step-2") in stop.value.hint
    assert (tmp_path / "verify-step-2/policy").is_dir()
    report = json.loads((tmp_path / "verify-step-2.json").read_text())
    console = (tmp_path / "console.txt").read_text()
    assert console.count("DIFFERS") == 2
    assert "policy gradients: first in model.norm.weight\npolicy weights: first in lm_head.weight\n" in console
    assert report["agrees"] is False
    assert report["rows"][1] == {
        "quantity": "policy gradients",
        "gap": None,
        "tolerance": 1e-4,
        "unit": "of largest entry",
        "differs": "model.norm.weight",
    }
