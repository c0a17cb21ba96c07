"""Lineage: which change makes which stage run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.checkpoint.artifacts import ArtifactStore
from rayrlhf.config import Config, load_config
from rayrlhf.errors import ConfigError, DataError
from rayrlhf.stages.lineage import Lineage

ALL = {"pretrain", "sft", "reward", "dpo", "ppo"}
FILES = ("text", "demonstrations", "rankings", "heldout_rankings", "prompts")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / f"{name}.jsonl").write_text(f'{{"is": "{name}"}}\n', encoding="utf-8")
    sources = "".join(f"  {name}: [{name}.jsonl]\n" for name in FILES)
    (tmp_path / "config.yaml").write_text(
        f"model: {{from_scratch: {{context: 256}}}}\ndata:\n  root: {tmp_path}\n{sources}", encoding="utf-8"
    )
    return tmp_path


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "config.yaml", overrides, {})


def lineage_of(folder: Path, *overrides: str) -> Lineage:
    return Lineage(config_of(folder, *overrides), ArtifactStore(folder / "artifacts"))


def keys(folder: Path, *overrides: str) -> dict[str, str]:
    lineage = lineage_of(folder, *overrides)
    return {stage: lineage.key(stage) for stage in sorted(ALL)}  # type: ignore[arg-type]


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage in before if before[stage] != after[stage]}


def model_folder(path: Path, content: str = "weights") -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}", encoding="utf-8")
    (path / "model.safetensors").write_text(content, encoding="utf-8")
    return path


def finish(folder: Path, lineage: Lineage, stage: str) -> None:
    store, key = ArtifactStore(folder / "artifacts"), lineage.key(stage)  # type: ignore[arg-type]
    workspace = store.workspace(stage, key)
    store.finish(workspace, stage, key, lineage.inputs(stage), lineage.parent_keys(stage), {})  # type: ignore[arg-type]


def test_the_same_config_and_files_give_the_same_keys_and_each_stage_its_own(folder: Path) -> None:
    assert keys(folder) == keys(folder)
    assert len(set(keys(folder).values())) == 5


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("text", ALL),
        ("demonstrations", ALL),
        ("rankings", {"reward", "dpo", "ppo"}),
        ("heldout_rankings", {"reward", "dpo", "ppo"}),
        ("prompts", {"ppo"}),
    ],
)
def test_altering_a_data_file_changes_the_stages_that_read_it_and_their_descendants_only(
    folder: Path, file: str, stages: set[str]
) -> None:
    before = keys(folder)
    with open(folder / f"{file}.jsonl", "a", encoding="utf-8") as stream:
        stream.write("\n")
    assert changed(before, keys(folder)) == stages


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("pretrain.epochs=2", ALL),
        ("sft.dropout=0.1", {"sft", "reward", "dpo", "ppo"}),
        ("sft.pretrain_mix.coef=0.1", {"sft", "reward", "dpo", "ppo"}),
        ("sft.select.by=heldout_loss", {"sft", "reward", "dpo", "ppo"}),
        ("reward.learning_rate=1e-4", {"reward", "ppo"}),
        ("reward.unit_variance=true", {"reward", "ppo"}),
        ("dpo.beta=0.5", {"dpo"}),
        ("dpo.learning_rate=1e-4", {"dpo"}),
        ("ppo.steps=7", {"ppo"}),
        ("ppo.kl.coef=0.5", {"ppo"}),
        ("ppo.adam.eps=1e-6", {"ppo"}),
        ("rollout.temperature=0.7", {"ppo"}),
        ("run.seed=1", ALL),
        ("model.from_scratch.layers=2", ALL),
        ("data.max_records=10", ALL),
        ("cluster.train.ranks=2", ALL),
        ("cluster.policy.ranks=2", {"ppo"}),
        ("run.name=another", set()),
        ("tracking.wandb=offline", set()),
        ("tracking.project=another", set()),
        ("tracking.samples_per_step=1", set()),
        ("checkpoint.keep=1", set()),
        ("cluster.policy.cpus=0.1", set()),
        ("cluster.call_timeout_s=1", set()),
        ("run.stages=[sft, ppo]", set()),
        ("run.stages=[dpo]", set()),
    ],
)
def test_a_setting_changes_the_stages_that_it_touches_and_their_descendants_only(
    folder: Path, override: str, stages: set[str]
) -> None:
    assert changed(keys(folder), keys(folder, override)) == stages


def test_moving_all_files_together_changes_no_key(folder: Path) -> None:
    before = keys(folder)
    (folder / "moved").mkdir()
    for name in FILES:
        (folder / f"{name}.jsonl").rename(folder / "moved" / f"{name}.jsonl")
    assert keys(folder, f"data.root={folder / 'moved'}") == before


def test_a_key_holds_the_keys_of_its_parents(folder: Path) -> None:
    lineage = lineage_of(folder)
    assert lineage.parent_keys("pretrain") == {}
    assert lineage.parent_keys("sft") == {"pretrain": lineage.key("pretrain")}
    assert lineage.parent_keys("reward") == {"sft": lineage.key("sft")}
    assert lineage.parent_keys("dpo") == {"sft": lineage.key("sft")}
    assert lineage.parent_keys("ppo") == {"sft": lineage.key("sft"), "reward": lineage.key("reward")}
    assert lineage.inputs("ppo")["parents"] == lineage.parent_keys("ppo")


def test_a_missing_data_file_is_a_data_error(folder: Path) -> None:
    (folder / "prompts.jsonl").unlink()
    with pytest.raises(DataError, match=r"prompts\.jsonl"):
        lineage_of(folder)


# ---- finished stages


def test_only_what_was_finished_under_the_same_key_is_found(folder: Path) -> None:
    lineage = lineage_of(folder)
    assert lineage.finished("pretrain") is None
    finish(folder, lineage, "pretrain")
    found = lineage.finished("pretrain")
    assert found is not None
    assert lineage.model("pretrain") == found.model == str(found.folder / "model")
    assert lineage.finished("sft") is None
    assert lineage_of(folder, "ppo.steps=7").finished("pretrain") is not None
    assert lineage_of(folder, "pretrain.epochs=2").finished("pretrain") is None


def test_a_stage_whose_parents_are_not_there_names_the_first_missing_one_and_both_cures(folder: Path) -> None:
    lineage = lineage_of(folder)
    with pytest.raises(ConfigError) as caught:
        lineage.parent_models("ppo")
    assert str(caught.value) == (
        "ppo starts from the sft model, and there is none for this config\n"
        "  hint: run `rayrlhf run` or `rayrlhf sft` first, or name one with sft.path"
    )
    finish(folder, lineage, "sft")
    with pytest.raises(ConfigError, match="ppo starts from the reward model"):
        lineage.parent_models("ppo")
    with pytest.raises(ConfigError, match=r"or name one with model\.path"):
        lineage.parent_models("sft")
    finish(folder, lineage, "reward")
    assert lineage.parent_models("ppo") == {"sft": lineage.model("sft"), "reward": lineage.model("reward")}


# ---- models given from outside


def test_a_given_model_stands_for_its_stage_by_its_content(folder: Path) -> None:
    sft = model_folder(folder / "given")
    given = (f"model={{path: {model_folder(folder / 'base')}}}", f"sft.path={sft}")
    lineage = lineage_of(folder, *given)
    before = keys(folder, *given)
    assert lineage.finished("sft") is None
    assert lineage.model("sft") == str(sft)
    assert lineage.parent_models("reward") == {"sft": str(sft)}
    assert keys(folder, *given) == before
    model_folder(folder / "given", "other weights")
    assert changed(before, keys(folder, *given)) == {"sft", "reward", "dpo", "ppo"}


def test_a_given_base_model_is_in_the_key_of_all_that_comes_from_it(folder: Path) -> None:
    given = f"model={{path: {model_folder(folder / 'given')}}}"
    before = keys(folder, given)
    model_folder(folder / "given", "other weights")
    assert changed(before, keys(folder, given)) == ALL


def test_a_given_reward_model_changes_ppo_only(folder: Path) -> None:
    given = (f"model={{path: {model_folder(folder / 'base')}}}", f"reward.path={model_folder(folder / 'given')}")
    before = keys(folder, *given)
    model_folder(folder / "given", "other weights")
    assert changed(before, keys(folder, *given)) == {"reward", "ppo"}


# ---- what sft reads only when it is asked to


@pytest.mark.parametrize(("coef", "stages"), [(0.0, set()), (0.1, {"sft", "reward", "dpo", "ppo"})])
def test_text_counts_among_what_sft_reads_only_where_it_is_mixed_in(
    folder: Path, coef: float, stages: set[str]
) -> None:
    given = (f"model={{path: {model_folder(folder / 'base')}}}", f"sft.pretrain_mix.coef={coef}")
    before = keys(folder, *given)
    with open(folder / "text.jsonl", "a", encoding="utf-8") as stream:
        stream.write("\n")
    assert changed(before, keys(folder, *given)) == stages


@pytest.mark.parametrize(("coef", "stages"), [(0.0, {"ppo"}), (0.1, {"sft", "reward", "dpo", "ppo"})])
def test_the_length_of_the_blocks_of_text_is_in_the_key_where_they_are_mixed_in(
    folder: Path, coef: float, stages: set[str]
) -> None:
    given = (f"model={{path: {model_folder(folder / 'base')}}}", f"sft.pretrain_mix.coef={coef}")
    assert changed(keys(folder, *given), keys(folder, *given, "rollout.max_tokens=200")) == stages


def test_other_weights_of_the_model_that_judges_the_epochs_make_another_sft(folder: Path) -> None:
    given = f"sft.select={{by: reward, reward_model: {model_folder(folder / 'judge')}}}"
    before = keys(folder, given)
    model_folder(folder / "judge", "other weights")
    assert changed(before, keys(folder, given)) == {"sft", "reward", "dpo", "ppo"}


# ---- what a key should hold and does not


@pytest.mark.parametrize("at_home", [False, True])
def test_altering_the_file_of_the_chat_template_changes_the_keys(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at_home: bool
) -> None:
    template = folder / "chat.jinja"
    monkeypatch.setenv("HOME", str(folder))
    setting = f"model.chat_template={'~/chat.jinja' if at_home else template}"
    template.write_text("{{ messages[0].content }}", encoding="utf-8")
    before = keys(folder, setting)
    template.write_text("{{ messages[0].content }}!", encoding="utf-8")
    assert {"sft", "reward", "dpo", "ppo"} <= changed(before, keys(folder, setting))


def test_the_limit_that_cuts_the_reward_models_demonstrations_changes_its_key(folder: Path) -> None:
    given = (f"model={{path: {model_folder(folder / 'base')}}}", f"sft.path={model_folder(folder / 'given')}")
    after = keys(folder, *given, "sft.max_response_tokens=7")
    assert changed(keys(folder, *given), after) == {"reward", "ppo"}


def test_a_finished_stage_that_is_to_run_again_counts_as_not_finished_and_keeps_its_key(folder: Path) -> None:
    first = lineage_of(folder)
    for stage in ("sft", "ppo"):
        finish(folder, first, stage)
    again = Lineage(config_of(folder), ArtifactStore(folder / "artifacts"), again=["ppo"])
    assert first.finished("ppo") is not None
    assert again.finished("ppo") is None
    assert again.finished("sft") is not None
    assert again.key("ppo") == first.key("ppo")
