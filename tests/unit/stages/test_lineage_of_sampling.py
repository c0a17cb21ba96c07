"""Lineage of the stages that sample: what makes collect and eval, and what comes of them, run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.checkpoint.artifacts import ArtifactStore
from rayrlhf.config import load_config
from rayrlhf.config.run import STAGES
from rayrlhf.errors import ConfigError
from rayrlhf.stages.lineage import Lineage

FILES = (
    *("text", "demonstrations", "ranking_prompts", "rankings", "heldout_rankings", "prompts", "heldout_prompts"),
    "multiple_choice",
)
COLLECTED = ("collect={}", "run.stages=[pretrain, sft, collect, reward, dpo, ppo, eval]")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / f"{name}.jsonl").write_text(f'{{"is": "{name}"}}\n', encoding="utf-8")
    (tmp_path / "own.py").write_text("# a world\n", encoding="utf-8")
    sources = "".join(f"  {name}: [{name}.jsonl]\n" for name in FILES)
    (tmp_path / "config.yaml").write_text(
        "model: {from_scratch: {context: 256}}\n"
        f"world: {{name: own, module: {tmp_path / 'own.py'}}}\n"
        f"data:\n  root: {tmp_path}\n{sources}",
        encoding="utf-8",
    )
    return tmp_path


def lineage_of(folder: Path, *overrides: str) -> Lineage:
    return Lineage(load_config(folder / "config.yaml", overrides, {}), ArtifactStore(folder / "artifacts"))


def keys(folder: Path, *overrides: str) -> dict[str, str]:
    lineage = lineage_of(folder, *overrides)
    return {stage: lineage.key(stage) for stage in STAGES}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage in before if before[stage] != after[stage]}


def append(path: Path) -> None:
    with open(path, "a", encoding="utf-8") as stream:
        stream.write("\n")


def finish(folder: Path, lineage: Lineage, stage: str) -> None:
    store, key = ArtifactStore(folder / "artifacts"), lineage.key(stage)  # type: ignore[arg-type]
    workspace = store.workspace(stage, key)
    store.finish(workspace, stage, key, lineage.inputs(stage), lineage.parent_keys(stage), {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("ranking_prompts", {"collect", "reward", "dpo", "ppo", "eval"}),
        ("heldout_prompts", {"collect", "reward", "dpo", "ppo", "eval"}),
        ("rankings", set()),
        ("heldout_rankings", set()),
        ("prompts", {"ppo", "eval"}),
        ("multiple_choice", {"eval"}),
    ],
)
def test_with_collect_the_reward_model_comes_from_collects_inputs_and_not_from_the_rankings_named(
    folder: Path, file: str, stages: set[str]
) -> None:
    before = keys(folder, *COLLECTED)
    append(folder / f"{file}.jsonl")
    assert changed(before, keys(folder, *COLLECTED)) == stages


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("ranking_prompts", {"collect"}),
        ("heldout_prompts", {"collect", "eval"}),
        ("rankings", {"reward", "dpo", "ppo", "eval"}),
        ("heldout_rankings", {"reward", "dpo", "ppo", "eval"}),
    ],
)
def test_without_collect_it_is_the_other_way_round(folder: Path, file: str, stages: set[str]) -> None:
    given = "run.stages=[pretrain, sft, reward, ppo, eval]"
    before = keys(folder, given)
    append(folder / f"{file}.jsonl")
    assert changed(before, keys(folder, given)) == stages


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("collect.most=5", {"collect", "reward", "dpo", "ppo", "eval"}),
        ("rollout.temperature=0.7", {"collect", "reward", "dpo", "ppo", "eval"}),
        ("reward.learning_rate=1e-4", {"reward", "ppo", "eval"}),
        ("dpo.beta=0.5", {"dpo", "eval"}),
        ("ppo.arms={a: {}, b: {ptx.coef: 1.0}}", {"ppo", "eval"}),
        ("eval.prompts=7", {"eval"}),
        ("eval.best_of=1", {"eval"}),
        ("run.stages=[pretrain, sft, collect, reward, ppo, eval]", {"eval"}),  # no dpo among its arms
        ("cluster.policy.cpus=0.1", set()),
    ],
)
def test_a_setting_changes_the_stages_that_it_touches_and_their_descendants_only(
    folder: Path, override: str, stages: set[str]
) -> None:
    assert changed(keys(folder, *COLLECTED), keys(folder, *COLLECTED, override)) == stages


def test_an_arm_that_learns_from_text_makes_ppo_read_it(folder: Path) -> None:
    given = "model={path: org/name}"  # a model from scratch takes its tokenizer from the text
    plain, arms = "ppo.arms={a: {}, b: {}}", "ppo.arms={a: {}, b: {ptx.coef: 1.0}}"
    before = keys(folder, given, plain), keys(folder, given, arms)
    append(folder / "text.jsonl")
    assert "ppo" not in changed(before[0], keys(folder, given, plain))
    assert "ppo" in changed(before[1], keys(folder, given, arms))


def test_another_judge_or_another_labeler_in_the_worlds_file_makes_collect_and_eval_run_again(folder: Path) -> None:
    before = keys(folder, *COLLECTED)
    append(folder / "own.py")
    assert changed(before, keys(folder, *COLLECTED)) == {"collect", "reward", "dpo", "ppo", "eval"}


def test_another_judge_makes_ppo_run_again_where_nothing_is_collected(folder: Path) -> None:
    before = keys(folder, "run.stages=[ppo]")
    append(folder / "own.py")
    assert "ppo" in changed(before, keys(folder, "run.stages=[ppo]"))


def test_other_weights_of_the_held_out_reward_model_make_eval_run_again(folder: Path) -> None:
    (folder / "judge").mkdir()
    (folder / "judge" / "model.safetensors").write_text("weights", encoding="utf-8")
    given = (*COLLECTED, f"eval.reward_model={folder / 'judge'}")
    before = keys(folder, *given)
    (folder / "judge" / "model.safetensors").write_text("other weights", encoding="utf-8")
    assert changed(before, keys(folder, *given)) == {"eval"}


def test_rankings_that_are_collected_are_a_parent_and_eval_has_every_policy_that_the_run_makes(folder: Path) -> None:
    lineage = lineage_of(folder, *COLLECTED)
    assert lineage.parents("collect") == ("sft",)
    assert lineage.parents("reward") == lineage.parents("dpo") == ("sft", "collect")
    assert lineage.parents("ppo") == ("sft", "reward")
    assert lineage.parents("eval") == ("sft", "reward", "dpo", "ppo")
    without = lineage_of(folder, "run.stages=[ppo, eval]")
    assert without.parents("reward") == ("sft",)
    assert without.parents("eval") == ("sft", "reward", "ppo")


def test_collected_rankings_are_no_model_but_must_be_there(folder: Path) -> None:
    lineage = lineage_of(folder, *COLLECTED)
    finish(folder, lineage, "sft")
    assert lineage.parent_models("reward", to_come=["collect"]) == {"sft": lineage.model("sft")}
    with pytest.raises(ConfigError) as caught:
        lineage.parent_models("reward")
    assert str(caught.value) == (
        "reward learns from the rankings of collect, and there are none for this config\n"
        "  hint: name collect in run.stages first, or set collect=null to use data.rankings"
    )
    finish(folder, lineage, "collect")
    assert lineage.parent_models("reward") == {"sft": lineage.model("sft")}
