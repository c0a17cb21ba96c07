"""What may change between a run and its `--resume`, and what is refused; of PPO, and of the supervised stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.checkpoint.artifacts import ArtifactStore
from rayrlhf.config import Config, load_config
from rayrlhf.errors import ConfigError
from rayrlhf.stages.lineage import Lineage
from rayrlhf.stages.resume import (
    as_json,
    check_same,
    has_checkpoints,
    inputs_of_arm,
    let_go,
    store_of_arm,
    store_of_training,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("prompts", "rankings", "demonstrations", "text"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"is": "{name}"}}\n')
    sources = "".join(f"  {name}: [{name}.jsonl]\n" for name in ("prompts", "rankings", "demonstrations", "text"))
    config = f"model: {{from_scratch: {{context: 256}}}}\ndata:\n  root: {tmp_path}\n{sources}"
    (tmp_path / "config.yaml").write_text(config)
    return tmp_path


def resume(folder: Path, *overrides: str) -> None:
    """Check a run with these overrides against the checkpoints that are there."""
    config, inputs = load_inputs(folder, *overrides)
    check_same(folder / "run", config, "ppo", inputs)


def refusal(check: Callable[..., None], *arguments: Any) -> str | None:
    """Why it is refused; None where it is not."""
    try:
        check(*arguments)
    except ConfigError as error:
        return error.message
    return None


def load_inputs(folder: Path, *overrides: str) -> tuple[Config, dict[str, object]]:
    config = load_config(folder / "config.yaml", overrides, {})
    return config, Lineage(config, ArtifactStore(folder / "artifacts")).inputs("ppo")


def save(folder: Path, *overrides: str) -> None:
    config, inputs = load_inputs(folder, *overrides)
    arms = config.arms()
    for name, arm in arms.items():
        store = store_of_arm(folder / "run", arm, name if len(arms) > 1 else None)
        (store.begin(2) / "model").write_text("weights")
        store.finish(2, {}, inputs_of_arm(inputs, arm), None)


@pytest.mark.parametrize(
    "override",
    [
        "run.deterministic=false",
        "ppo.steps=20",
        "rollout.engines=3",
        "rollout.tensor_parallel=2",
        "weights.bucket_mib=8",
        "cluster.reference.ranks=2",
        "cluster.policy.threads=4",
        "checkpoint.every=7",
        "tracking.wandb=offline",
        "run.output=elsewhere",
    ],
)
def test_what_does_not_change_what_is_learned_may_change(folder: Path, override: str) -> None:
    save(folder)
    assert refusal(resume, folder, override) is None


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("run.seed=1", "seed was 0, is 1"),
        ("ppo.clip=0.1", "ppo.clip was 0.2, is 0.1"),
        ("ppo.adam.betas=[0.9, 0.99]", "ppo.adam.betas was [0.9, 0.95], is [0.9, 0.99]"),
        ("rollout.max_tokens=8", "rollout.max_tokens was 128, is 8"),
        ("cluster.policy.ranks=2", "ranks.policy was 1, is 2"),
        ("deepspeed.activation_checkpointing=true", "deepspeed.activation_checkpointing was false, is true"),
        ("sft.learning_rate=1e-4", "parents.sft was"),
    ],
)
def test_what_changes_what_is_learned_is_refused_with_the_difference(folder: Path, override: str, shown: str) -> None:
    save(folder)
    with pytest.raises(ConfigError) as refused:
        resume(folder, override)
    assert shown in refused.value.message
    assert "--resume" in refused.value.hint


def test_other_prompts_are_refused_even_under_the_same_name(folder: Path) -> None:
    save(folder)
    (folder / "prompts.jsonl").write_text('{"is": "other"}\n')
    with pytest.raises(ConfigError, match=r"sources\.prompts"):
        resume(folder)


def test_each_arm_is_held_to_its_own_settings(folder: Path) -> None:
    arms = "ppo.arms={plain: {ptx.coef: 0}, gentle: {clip: 0.1}}"
    save(folder, arms)
    resume(folder, arms)
    with pytest.raises(ConfigError, match=r"ppo\.clip was 0\.1, is 0\.3"):
        resume(folder, "ppo.arms={plain: {ptx.coef: 0}, gentle: {clip: 0.3}}")


def test_a_run_without_checkpoints_is_held_to_nothing(folder: Path) -> None:
    assert refusal(resume, folder, "ppo.clip=0.1") is None
    save(folder)
    assert "ppo.clip was 0.2, is 0.1" in str(refusal(resume, folder, "ppo.clip=0.1"))


def test_fewer_steps_than_are_done_are_refused(folder: Path) -> None:
    save(folder)
    with pytest.raises(ConfigError, match=r"step-000002 is past ppo\.steps, 1"):
        resume(folder, "ppo.steps=1")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], ["ppo.arms={a: {}, b: {clip: 0.1}}"], "its checkpoints are of one run, ppo.arms names several"),
        (["ppo.arms={a: {}, b: {clip: 0.1}}"], [], "its checkpoints are of several arms, ppo.arms names none or one"),
    ],
)
def test_one_run_does_not_go_on_as_several_arms(
    folder: Path, before: list[str], after: list[str], message: str
) -> None:
    save(folder, *before)
    with pytest.raises(ConfigError, match=message):
        resume(folder, *after)


# ---- supervised stages


def save_training(folder: Path, stage: str, *overrides: str) -> None:
    config = load_config(folder / "config.yaml", overrides, {})
    inputs = Lineage(config, ArtifactStore(folder / "artifacts")).inputs(stage)  # type: ignore[arg-type]
    store = store_of_training(folder / "run", config, stage)
    (store.begin(2) / "before.json").write_text("{}")
    store.finish(2, {}, as_json(inputs), None)


def resume_training(folder: Path, stage: str, *overrides: str) -> None:
    config = load_config(folder / "config.yaml", overrides, {})
    inputs = Lineage(config, ArtifactStore(folder / "artifacts")).inputs(stage)  # type: ignore[arg-type]
    check_same(folder / "run", config, stage, inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("pretrain", "pretrain.log_every=3"),
        ("sft", "sft.log_every=3"),
        ("sft", "cluster.train.threads=1"),
        ("sft", "cluster.recovery.max_restarts=7"),
        ("sft", "checkpoint.training_every=7"),
        ("sft", "ppo.clip=0.1"),
        ("reward", "run.output=elsewhere"),
        ("dpo", "tracking.wandb=offline"),
    ],
)
def test_a_supervised_stage_may_change_what_does_not_change_what_it_learns(
    folder: Path, stage: str, override: str
) -> None:
    save_training(folder, stage)
    assert refusal(resume_training, folder, stage, override) is None


@pytest.mark.parametrize(
    ("stage", "override", "shown"),
    [
        ("pretrain", "pretrain.max_steps=9", "pretrain.max_steps was null, is 9"),
        ("sft", "sft.epochs=3", "sft.epochs was 16.0, is 3.0"),
        ("sft", "sft.select.by=heldout_loss", 'sft.select.by was "last", is "heldout_loss"'),
        ("sft", "cluster.train.ranks=2", "ranks.train was 1, is 2"),
        ("sft", "sft.zero_stage=1", "sft.zero_stage was 0, is 1"),
        ("sft", "run.seed=1", "seed was 0, is 1"),
        ("reward", "sft.learning_rate=1e-4", "parents.sft was"),
        ("dpo", "dpo.beta=0.3", "dpo.beta was 0.1, is 0.3"),
    ],
)
def test_a_supervised_stage_refuses_what_changes_what_it_learns(
    folder: Path, stage: str, override: str, shown: str
) -> None:
    save_training(folder, stage)
    with pytest.raises(ConfigError) as refused:
        resume_training(folder, stage, override)
    assert shown in refused.value.message
    assert f"checkpoints/training/{stage}/step-000002" in refused.value.message


def test_a_stage_is_not_held_to_anothers_checkpoints_nor_ppo_to_those_of_training(folder: Path) -> None:
    save_training(folder, "sft")
    assert refusal(resume_training, folder, "reward", "reward.epochs=2") is None
    assert refusal(resume, folder, "ppo.clip=0.1") is None
    assert refusal(resume, folder, "ppo.arms={training: {clip: 0.1}, other: {}}") is None


def test_there_is_something_to_go_on_from_only_for_the_stages_that_have_it(folder: Path) -> None:
    save_training(folder, "sft")
    assert has_checkpoints(folder / "run", ["sft", "ppo"])
    assert not has_checkpoints(folder / "run", ["pretrain", "collect", "reward", "ppo", "eval"])
    save(folder, "ppo.arms={training: {clip: 0.1}, other: {}}")
    assert has_checkpoints(folder / "run", ["ppo"])
    assert not has_checkpoints(folder / "run", [])


def test_a_stage_that_is_done_lets_go_of_its_own_checkpoints_alone(folder: Path) -> None:
    save_training(folder, "sft")
    save_training(folder, "reward")
    let_go(folder / "run", "sft")
    let_go(folder / "run", "pretrain")
    assert not has_checkpoints(folder / "run", ["sft"])
    assert has_checkpoints(folder / "run", ["reward"])
    let_go(folder / "run", "reward")
    assert not (folder / "run" / "checkpoints").exists()
