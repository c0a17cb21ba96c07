"""What may change between a run and its `--resume`, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.checkpoint.artifacts import ArtifactStore
from rayrlhf.config import Config, load_config
from rayrlhf.errors import ConfigError
from rayrlhf.stages.lineage import Lineage
from rayrlhf.stages.resume import check_same, inputs_of_arm, store_of_arm


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
    resume(folder, override)


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
    resume(folder, "ppo.clip=0.1")


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
