"""Secrets planted where people put them by mistake: refused by the key, and repeated nowhere."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rayrlhf import cli
from rayrlhf.config import Config, config_from, dump_config, load_config
from rayrlhf.config.secrets import masked
from rayrlhf.errors import ConfigError
from rayrlhf.evaluation.report import write_report
from tests.made_run import write_run

SECRET = "hunter2-Zq9vX0"
# Parts, so that no scanner of this repository takes them for real ones.
TOKENS = {
    "hugging face": "hf_" + "aB3" * 11 + "x",
    "openai": "sk-" + "proj-aB3dE5gH7jK9mN1pQ3sT5",
    "github": "ghp_" + "aB3" * 12,
    "aws": "AKIA" + "ABCDEFGH12345678",
    "jwt": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "c2lnbmF0dXJl",
    "url with a password": f"https://me:{SECRET}@models.example/llama",
    "url with an empty user": f"redis://:{SECRET}@10.0.0.1:6379",
    "url with a token": f"https://bucket.example/data.jsonl?X-Amz-Signature={SECRET}&x=1",
    "url with a key": f"https://rewards.example/score?v=2&key={SECRET}",
    "url with a function's code": f"https://rewards.example/api/score?code={SECRET}",
    "url with a shared signature": f"https://account.example/blob?sv=1&sig={SECRET}",
    "url with a token for a name": f"https://{SECRET}abcdef@git.example/model",
    "header": "Authorization: Bearer abcdefghij0123456789",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
}
BASE = {
    "model": {"path": "org/name"},
    "data": {name: ["x.jsonl"] for name in ("demonstrations", "rankings", "prompts")},
}


def strings_of(section: type, prefix: str = "") -> list[str]:
    """Dotted keys of all fields that take a text of any kind."""
    found = []
    for name, field in section.model_fields.items():  # type: ignore[attr-defined]
        if hasattr(field.annotation, "model_fields"):
            found += strings_of(field.annotation, f"{prefix}{name}.")
        elif any(kind in str(field.annotation) for kind in ("str", "Path", "Any")):
            found.append(f"{prefix}{name}")
    return found


KEYS = strings_of(Config)


def test_the_keys_that_are_tried_are_those_there_are() -> None:
    assert {"model.path", "data.prompts", "cluster.address", "tracking.project", "deepspeed.extra"} <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_a_secret_in_any_key_is_refused_by_the_key_and_not_repeated(key: str) -> None:
    for value in TOKENS.values():
        shaped = {"deepspeed.extra": {"a": {"b": [value]}}, "ppo.arms": {"a": {"x": value}}, "run.stages": [value]}
        with pytest.raises(ConfigError) as refused:
            config_from(deepcopy(BASE), [f"{key}={json.dumps(shaped.get(key, value))}"], {}, "mine.yaml")
        message = str(refused.value)
        assert message.startswith(f"mine.yaml: {key}")
        assert "environment" in refused.value.hint
        assert value not in message
        assert SECRET not in message


@pytest.mark.parametrize(
    "override",
    [
        f"tracking.wandb_api_key={SECRET}",
        f"model.hf_token={SECRET}",
        f"deepspeed.extra={{wandb: {{api_key: {SECRET}}}}}",
        f"deepspeed.extra={{monitor: [{{password: {SECRET}}}]}}",
        f"deepspeed.extra={{service: {{auth: {SECRET}}}}}",
        f"deepspeed.extra={{service: {{key: {SECRET}}}}}",
        f"ppo.reward={{token: {SECRET}}}",
        f"cluster={{secret: {SECRET}}}",
        f"run.seed=https://me:{SECRET}@x.example",
        f"nonsense=https://me:{SECRET}@x.example",
        f"https://me:{SECRET}@x.example/",
        f"model.path=[https://me:{SECRET}@x.example",
        f"model.path={{https://me:{SECRET}@x.example: 1}}",
    ],
)
def test_a_secret_in_the_wrong_place_is_not_repeated(override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_from(deepcopy(BASE), [override], {})
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("variable", ["HF_TOKEN", "WANDB_API_KEY", "REWARD_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_what_the_environment_keeps_secret_is_refused_wherever_it_stands(variable: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_from(deepcopy(BASE), [f"tracking.project=team-{SECRET}-x"], {variable: SECRET})
    assert str(refused.value).startswith(
        f"the config: tracking.project: holds the value of the environment's {variable}"
    )
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        "model.path=s3://bucket/model",
        "model.path=/data/ssh://git@host/model",
        "model.path=/data/sk-learn-preprocessed-data-version-two",
        "model.path=/data/0123456789abcdef0123456789abcdef01234567",  # a commit
        "cluster.address=ray://10.0.0.1:10001",
        "tracking.project=tokens-and-secrets",
        "model.chat_template='{{ bos_token }}{{ messages[0].content }} user: a@b.example, tel:1'",
        "data.prompts=['who@where.jsonl']",
        "ppo.micro_batch_tokens=4096",
        "rollout.max_tokens=16",
        "cluster.policy.resources={access_key: 1}",
        "deepspeed.extra={zero_optimization: {reduce_bucket_size: 5}}",
    ],
)
def test_what_is_no_secret_passes(override: str) -> None:
    config = config_from(deepcopy(BASE), [override], {"HOME_TOKEN": "short", "PATH": "org/name", "KEY": "org/name"})
    dotted, _, value = override.partition("=")
    node = config.model_dump(mode="json")
    for part in dotted.split("."):
        node = node[part]
    assert node == YAML(typ="safe", pure=True).load(value)


def test_a_secret_in_the_environment_is_in_no_dump_and_no_arm() -> None:
    environ = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "REWARD_TOKEN"), SECRET)
    config = config_from(deepcopy(BASE), ["ppo.arms={a: {}, b: {kl.coef: 0}}"], environ)
    assert SECRET not in dump_config(config) + str(config.model_dump(mode="json")) + repr(config.arms())


def test_the_command_repeats_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump({**BASE, "model": {"path": TOKENS["url with a password"]}}, file)
    for arguments in (["run", str(path)], ["eval", TOKENS["url with a password"]], ["run", TOKENS["url with a token"]]):
        monkeypatch.setattr(sys, "argv", ["rayrlhf", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        shown = capsys.readouterr()
        assert left.value.code == 2
        assert SECRET not in shown.out + shown.err
        assert "Traceback" not in shown.err


def test_errors_of_others_are_shown_and_kept_without_the_secrets_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "plain-words-only")
    for value in (*TOKENS.values(), "plain-words-only"):
        assert "***" in masked(f"cannot reach {value} at all")
        assert value not in masked(f"cannot reach {value} at all")
    assert (
        masked("cannot reach https://me@x.example/a?b=c at 10:30") == "cannot reach https://me@x.example/a?b=c at 10:30"
    )


def test_the_report_of_a_run_of_an_older_version_shows_no_password(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", prompts=2, steps=2)
    with (run / "config.yaml").open("a") as file:
        file.write(f"\nmirror: {{url: '{TOKENS['url with a password']}', more: [['{TOKENS['openai']}']]}}\n")
    load_failed = pytest.raises(ConfigError, match="mirror")
    with load_failed as refused:
        load_config(run / "config.yaml", environ={})
    page = write_report([run]).read_text(encoding="utf-8")
    assert "mirror.url" in page
    assert SECRET not in page + str(refused.value)
    assert TOKENS["openai"] not in page
