"""What PPO starts from with each source of rewards, what its artifact depends on, and where the token goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.actors.sources import EnsembleActor, FreshValueActor, SourceActor
from rayrlhf.checkpoint.artifacts import ArtifactStore
from rayrlhf.config import Config, dump_config, load_config
from rayrlhf.errors import ConfigError
from rayrlhf.stages.lineage import Lineage
from rayrlhf.stages.resume import check_same, inputs_of_arm, store_of_arm
from rayrlhf.stages.roles import deadlines_of
from rayrlhf.stages.sources import check_source, plan_models
from rayrlhf.types import Prompt

TOKEN = "planted-Secret-77aa"
PROMPTS = {3: Prompt((("user", "hello"),), "forum")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = ("prompts", "rankings", "demonstrations", "heldout_prompts")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(f'{{"is": "{name}"}}\n')
    sources = "".join(f"  {name}: [{name}.jsonl]\n" for name in names)
    (tmp_path / "config.yaml").write_text(f"model: {{path: {tmp_path / 'base'}}}\ndata:\n  root: {tmp_path}\n{sources}")
    for name in ("base", "first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    (tmp_path / "mine.py").write_text("def reward(prompts, responses):\n    return [1.0 for _ in responses]\n")
    return tmp_path


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "config.yaml", overrides, {})


def function(folder: Path) -> tuple[str, ...]:
    return "ppo.reward.kind=function", f"ppo.reward.function={folder / 'mine.py'}:reward"


def http(folder: Path) -> tuple[str, ...]:
    return "ppo.reward.kind=http", "ppo.reward.url=https://rewards.example/score"


def ensemble(folder: Path) -> tuple[str, ...]:
    return "ppo.reward.kind=ensemble", f"ppo.reward.models=[{folder / 'first'}, {folder / 'second'}]"


KINDS = [function, http, ensemble]


def lineage_of(folder: Path, *overrides: str) -> Lineage:
    return Lineage(config_of(folder, *overrides), ArtifactStore(folder / "artifacts"))


def key(folder: Path, *overrides: str) -> str:
    return lineage_of(folder, *overrides).key("ppo")


# ---- what PPO starts from


def test_with_a_reward_model_it_scores_and_the_value_model_starts_from_it(folder: Path) -> None:
    planned = plan_models(config_of(folder), {"sft": "S", "reward": "R"}, PROMPTS)
    assert dict(planned.models) == {"policy": "S", "reference": "S", "reward": "R", "value": "R"}
    assert (dict(planned.actors), planned.source) == ({}, None)


def test_an_ensemble_scores_with_all_its_models_and_the_value_model_starts_from_its_first(folder: Path) -> None:
    planned = plan_models(config_of(folder, *ensemble(folder)), {"sft": "S"}, PROMPTS)
    first, second = str(folder / "first"), str(folder / "second")
    assert dict(planned.models) == {"policy": "S", "reference": "S", "reward": first, "value": first}
    assert dict(planned.actors) == {"reward": EnsembleActor}
    assert planned.source is not None
    assert planned.source.members == (first, second)


def test_text_is_scored_without_a_model_and_the_value_model_starts_from_sft(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    config = config_of(folder, "ppo.reward.kind=function", "ppo.reward.function=mine.py:reward", "run.seed=5")
    planned = plan_models(config, {"sft": "S"}, PROMPTS)
    assert set(planned.models.values()) == {"S"}
    assert dict(planned.actors) == {"reward": SourceActor, "value": FreshValueActor}
    assert planned.source is not None
    assert planned.source.config.function == f"{folder / 'mine.py'}:reward"  # actors live elsewhere
    assert (planned.source.prompts, planned.source.seed) == (PROMPTS, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_reward_model_is_a_parent_then_unless_one_is_given_for_eval(folder: Path, kind) -> None:
    stages = "run.stages=[sft, reward, ppo, eval]"
    lineage = lineage_of(folder, stages, *kind(folder))
    assert lineage.parents("ppo") == ("sft",)
    assert lineage.parents("eval") == ("sft", "ppo")
    assert lineage_of(folder, stages).parents("ppo") == ("sft", "reward")
    given = lineage_of(folder, stages, *kind(folder), f"reward.path={folder / 'first'}")
    assert (given.parents("ppo"), given.parents("eval")) == (("sft",), ("sft", "reward", "ppo"))


# ---- what the artifact depends on


def test_where_the_rewards_come_from_names_the_artifact(folder: Path) -> None:
    kinds = [(), *(kind(folder) for kind in KINDS)]
    assert len({key(folder, *kind) for kind in kinds}) == 4
    assert key(folder, *http(folder)) != key(folder, "ppo.reward={kind: http, url: 'https://other.example/score'}")
    assert key(folder, *ensemble(folder)) != key(folder, *ensemble(folder), "ppo.reward.how=min")


def test_what_else_decides_a_reward_names_it_too(folder: Path) -> None:
    before = [key(folder, *kind(folder)) for kind in KINDS]
    (folder / "mine.py").write_text("def reward(prompts, responses):\n    return [2.0 for _ in responses]\n")
    (folder / "second" / "model.safetensors").write_text("other weights")
    after = [key(folder, *kind(folder)) for kind in KINDS]
    assert [a != b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_a_module_is_hashed_without_being_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    (folder / "judge_of_lineage.py").write_text("raise SystemExit('it was run')\n")
    module = ("ppo.reward.kind=function", "ppo.reward.function=judge_of_lineage:reward")
    before = key(folder, *module)
    (folder / "judge_of_lineage.py").write_text("raise SystemExit('it was run again')\n")
    assert key(folder, *module) != before


LIMITS = [
    *("batch=5", "timeout_s=3", "retries=1", "backoff_s=2", "max_wait_s=9", "concurrency=2", "breaker_failures=9"),
    *("breaker_pause_s=3", "max_response_mib=2", "token_variable=OTHER_TOKEN"),
]


@pytest.mark.parametrize("limit", LIMITS)
def test_limits_change_no_reward_and_may_change_between_a_run_and_its_resume(folder: Path, limit: str) -> None:
    changed = (*http(folder), f"ppo.reward.{limit}")
    assert key(folder, *changed) == key(folder, *http(folder))
    save(folder, *http(folder))
    resume(folder, *changed)


def test_another_source_is_refused_when_resuming_with_the_difference(folder: Path) -> None:
    save(folder, *function(folder))
    with pytest.raises(ConfigError, match=r"ppo\.reward\.kind was \"function\", is \"http\""):
        resume(folder, *http(folder))
    (folder / "mine.py").write_text("reward = None\n")
    with pytest.raises(ConfigError, match=r"reward_source\.function was"):
        resume(folder, *function(folder))


def save(folder: Path, *overrides: str) -> None:
    config = config_of(folder, *overrides)
    store = store_of_arm(folder / "run", config, None)
    (store.begin(2) / "model").write_text("weights")
    store.finish(2, {}, inputs_of_arm(lineage_of(folder, *overrides).inputs("ppo"), config), None)


def resume(folder: Path, *overrides: str) -> None:
    config = config_of(folder, *overrides)
    check_same(folder / "run", config, "ppo", lineage_of(folder, *overrides).inputs("ppo"))


# ---- the token


def test_the_token_comes_from_the_environment_and_shows_nowhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", f" {TOKEN}\n")
    config = config_of(folder, *http(folder), "ppo.reward.token_variable=REWARD_TOKEN")
    check_source(config)
    planned = plan_models(config, {"sft": "S"}, PROMPTS)
    assert planned.source is not None
    assert planned.source.token == TOKEN
    lineage = Lineage(config, ArtifactStore(folder / "artifacts"))
    assert TOKEN not in f"{planned!r} {planned.source} {dump_config(config)} {lineage.inputs('ppo')}"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "the environment has no REWARD_TOKEN"),
        ("s3cret\nX-Admin: 1", "cannot stand in a header"),
        ("s3cret two", "cannot stand in a header"),
        ("s3cret-ü", "cannot stand in a header"),
    ],
)
def test_a_token_that_is_missing_or_none_is_refused_and_not_repeated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", value)
    config = config_of(folder, *http(folder), "ppo.reward.token_variable=REWARD_TOKEN")
    with pytest.raises(ConfigError) as refused:
        check_source(config)
    assert said in refused.value.message
    assert "s3cret" not in str(refused.value)


def test_a_source_that_is_slow_within_its_own_limits_has_not_hung(folder: Path) -> None:
    """512 responses in calls of 32, each tried four times for up to 120 s, with 30 s between: 9600 s."""
    slow = (*function(folder), "ppo.batch_size=512", "ppo.reward.batch=32", "ppo.reward.timeout_s=120")
    limits = (*slow, "ppo.reward.retries=3", "ppo.reward.max_wait_s=30", "cluster.call_timeout_s=1800")
    deadlines = deadlines_of(config_of(folder, *limits), "reward", 1)
    assert deadlines.of("score") == 9600.0
    deadlines.took("score", 1.0)
    assert deadlines.of("score") == 9600.0
    assert deadlines_of(config_of(folder, *limits), "policy", 1).of("update") == 1800.0
