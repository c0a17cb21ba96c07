"""`ppo.reward`: the keys of each kind together, and what they change in the rest of the config."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.config import Config, dump_config, load_config
from rayrlhf.config.rewards import RewardSourceConfig
from rayrlhf.errors import ConfigError

BASE = """\
model: {path: org/name}
data: {demonstrations: [d.jsonl], rankings: [r.jsonl], prompts: [p.jsonl], heldout_prompts: [h.jsonl]}
"""
FUNCTION = ("ppo.reward.kind=function", "ppo.reward.function=mine.py:reward")
HTTP = ("ppo.reward.kind=http", "ppo.reward.url=https://rewards.example/score")
ENSEMBLE = ("ppo.reward.kind=ensemble", "ppo.reward.models=[a, b]")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


def load(base: Path, *overrides: str) -> Config:
    return load_config(base, overrides, {})


@pytest.mark.parametrize("kind", [(), FUNCTION, HTTP, ENSEMBLE])
def test_each_kind_survives_being_written_and_read_again(base: Path, kind: tuple[str, ...], tmp_path: Path) -> None:
    config = load(base, *kind)
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml", (), {}) == config
    assert load(base, *kind, "ppo.arms={a: {clip: 0.1}, b: {}}").arms()["a"].ppo.reward == config.ppo.reward


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.reward.kind=function"], "kind function needs function"),
        (["ppo.reward.kind=http"], "kind http needs url"),
        (["ppo.reward.kind=ensemble"], "kind ensemble needs models"),
        (["ppo.reward.url=https://a.example"], "url is for kind http, and kind is model"),
        (["ppo.reward.timeout_s=3"], "timeout_s is for kind function or http, and kind is model"),
        ([*FUNCTION, "ppo.reward.models=[a]"], "models is for kind ensemble, and kind is function"),
        ([*FUNCTION, "ppo.reward.concurrency=2"], "concurrency is for kind http, and kind is function"),
        ([*HTTP, "ppo.reward.how=min"], "how is for kind ensemble, and kind is http"),
        ([*ENSEMBLE, "ppo.reward.retries=1"], "retries is for kind function or http, and kind is ensemble"),
        (["ppo.reward.kind=oracle"], "ppo.reward.kind: found 'oracle'"),
        (["ppo.reward.kind=function", "ppo.reward.function=mine.py"], "write path/to/file.py:name"),
        (["ppo.reward.kind=function", "ppo.reward.function=mine.py:a b"], "write path/to/file.py:name"),
        (["ppo.reward.kind=http", "ppo.reward.url=rewards.example/score"], "url is not one of a service"),
        (["ppo.reward.kind=http", "ppo.reward.url=ftp://rewards.example"], "url is not one of a service"),
        (["ppo.reward.kind=http", "ppo.reward.url=file:///etc/passwd"], "url is not one of a service"),
        (["ppo.reward.kind=http", "ppo.reward.url='https://[bad'"], "url is not one of a service"),
        (["ppo.reward.kind=http", "ppo.reward.url=http://a.example:99999/"], "url is not one of a service"),
        ([*HTTP, "ppo.reward.timeout_s=.inf"], "ppo.reward.timeout_s"),
        (
            [*HTTP, "ppo.reward.token_variable=MY_REWARDS"],
            "token_variable: a name that ends with TOKEN or KEY",
        ),
        (
            ["ppo.reward.kind=http", "ppo.reward.url=http://a.example/", "ppo.reward.token_variable=T_TOKEN"],
            "the token would travel to a.example unencrypted",
        ),
        ([*FUNCTION, "cluster.shared=[[reference, reward]]"], "take reward out of cluster.shared"),
        (["ppo.arms={a: {reward.kind: http}}"], "ppo.arms.a.reward.kind: belongs to the actors"),
    ],
)
def test_what_does_not_fit_together_is_one_message(base: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(base, *overrides)
    assert message in refused.value.message
    assert refused.value.message.count("base.yaml: ") == 1


@pytest.mark.parametrize("overrides", [["url=https://me:s3cret-Pass@a.example/"], ["token_variable=s3cret-Pass"]])
def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(base: Path, overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(base, *HTTP, *(f"ppo.reward.{override}" for override in overrides))
    assert "token_variable" in str(refused.value)
    assert "s3cret-Pass" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_token_may_go_unencrypted_to_this_machine(base: Path, host: str) -> None:
    given = f"ppo.reward={{kind: http, url: 'http://{host}:80/', token_variable: REWARD_TOKEN}}"
    assert load(base, given).ppo.reward.token_variable == "REWARD_TOKEN"


@pytest.mark.parametrize("kind", [FUNCTION, HTTP, ENSEMBLE])
def test_no_reward_model_is_made_for_a_ppo_that_needs_none(base: Path, kind: tuple[str, ...]) -> None:
    assert load(base).stages() == ("sft", "reward", "ppo")
    assert load(base, *kind).stages() == ("sft", "ppo")
    assert load(base, *kind, "data.rankings=[]").stages() == ("sft", "ppo")
    assert load(base, *kind, "run.stages=[reward]").stages() == ("reward",)


def test_rankings_are_collected_for_dpo_alone_where_no_reward_model_learns_from_them(base: Path) -> None:
    collecting = ("world.name=instructions", "collect={}", *FUNCTION)
    assert load(base, *collecting).stages() == ("sft", "ppo")
    stages = "run.stages=[sft, collect, reward, dpo, ppo]"
    assert load(base, *collecting, stages).stages() == ("sft", "collect", "dpo", "ppo")


def test_an_ensemble_and_a_model_from_scratch_contradict_each_other(base: Path) -> None:
    scratch = ("model={from_scratch: {}}", "data.text=[t.txt]")
    with pytest.raises(ConfigError, match=r"ppo\.reward\.models and model\.from_scratch contradict each other"):
        load(base, *scratch, *ENSEMBLE)


def test_what_decides_a_reward_is_told_from_how_long_it_is_waited_for() -> None:
    http = {"kind": "http", "url": "https://a.example/", "timeout_s": 3.0, "token_variable": "T_TOKEN", "batch": 5}
    assert RewardSourceConfig.model_validate(http).deciding() == {"kind": "http", "url": "https://a.example/"}
    assert RewardSourceConfig().deciding() == {"kind": "model"}
    ensemble = RewardSourceConfig.model_validate({"kind": "ensemble", "models": ["a"], "how": "uwo"})
    assert ensemble.deciding() == {"kind": "ensemble", "models": ["a"], "how": "uwo", "weight": 0.1}


def test_how_long_scoring_may_take_counts_every_try_and_wait_of_every_round() -> None:
    keys = {"retries": 3, "timeout_s": 20.0, "max_wait_s": 10.0, "batch": 32}
    http = RewardSourceConfig.model_validate({"kind": "http", "url": "https://a.example/", "concurrency": 4, **keys})
    function = RewardSourceConfig.model_validate({"kind": "function", "function": "m:f", **keys})
    # 512 responses are 16 calls: four rounds of four at once, or one after the other; each up to 4 x (20 + 10) s.
    assert http.longest_s(512) == 4 * 120
    assert http.longest_s(513) == 5 * 120
    assert function.longest_s(512) == 16 * 120
