"""Bad input, as the person at the console meets it: exit code 2, one readable message, before any actor starts."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

import rayrlhf.actors.cluster
import rayrlhf.stages.context
import rayrlhf.stages.run
from rayrlhf import cli
from rayrlhf.actors.placement import check_resources
from rayrlhf.config import Config, load_config
from rayrlhf.data.readers import read_demonstrations
from rayrlhf.data.split import split_by_prompt
from rayrlhf.data.tokenizer import train_tokenizer
from rayrlhf.errors import ResourceError
from rayrlhf.stages.datasets import Datasets
from rayrlhf.worlds.base import create_world
from rayrlhf.worlds.files import write_world

ROOT = Path(__file__).parents[3]
FILES = ("text", "demonstrations", "rankings", "heldout_rankings", "prompts")
CONFIG = """\
model:
  from_scratch: {vocab_size: 320, hidden_size: 32, layers: 1, heads: 1, context: 128}
data:
  text: [text.jsonl]
  demonstrations: [demonstrations.jsonl]
  rankings: [rankings.jsonl]
  heldout_rankings: [heldout_rankings.jsonl]
  prompts: [prompts.jsonl]
  max_prompt_tokens: 96
sft: {max_response_tokens: 32}
reward: {max_response_tokens: 32}
dpo: {max_response_tokens: 32}
rollout: {max_tokens: 32}
"""


# ---- a small world, and models small enough to write in a moment


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first records of each file of the built-in world, and a config that reads them."""
    folder = tmp_path_factory.mktemp("world")
    for path in write_world(create_world("instructions"), folder, seed=0, size=0.1).values():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:30]), encoding="utf-8")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return folder


@pytest.fixture
def world(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "world"))


@pytest.fixture(scope="session")
def models(original: Path) -> Path:
    """policy (llama), fitting and misfitting reward models (gpt2): all tiny, all with weights."""
    folder = original.parent / "models"
    rows = (original / "text.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(row)["text"] for row in rows]

    def reward(name: str, tokenizer: Any, **shape: int) -> None:
        settings = {"vocab_size": len(tokenizer), "n_positions": 128, "n_embd": 8, "n_layer": 1, "n_head": 1} | shape
        config = GPT2Config(**settings, num_labels=1, pad_token_id=1, bos_token_id=0, eos_token_id=0)
        GPT2ForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    ours, theirs = train_tokenizer(texts, 320), train_tokenizer(["completely different words"], 270)
    llama = LlamaConfig(
        vocab_size=len(ours),
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=1,
    )
    LlamaForCausalLM(llama).save_pretrained(folder / "policy")
    ours.save_pretrained(folder / "policy")
    wide = LlamaConfig(**llama.to_dict() | {"hidden_size": 64, "head_dim": 64})
    for name, shape, tokenizer in (("wide", wide, ours), ("reworded", llama, theirs)):
        LlamaForCausalLM(shape).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    reward("reward", ours)
    reward("foreign", theirs)
    reward("small_embedding", ours, vocab_size=100)
    reward("short", ours, n_positions=64)
    return folder


def retokenized(models: Path, folder: Path, alter: Callable[[Any], None]) -> Path:
    """A copy of the policy whose tokenizer is altered."""
    shutil.copytree(models / "policy", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    alter(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


# ---- the console


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever reaches for Ray fails its test."""

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("bad input got as far as Ray")

    monkeypatch.setattr(rayrlhf.actors.cluster, "connect", reached)
    monkeypatch.setattr(rayrlhf.stages.context, "connect", reached)
    monkeypatch.setattr(ray, "init", reached)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a wrong name must not cost retries
    monkeypatch.delenv("RAYRLHF_HUMAN_DATA", raising=False)
    yield
    assert not ray.is_initialized()


Run = Callable[..., Done]


@pytest.fixture
def rayrlhf_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["rayrlhf", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code or 0
        out, err = (re.sub(r"\x1b\[[0-9;]*m", "", text) for text in capsys.readouterr())
        return Done(code, out, err)

    return run


@pytest.fixture
def run_world(rayrlhf_command: Run, world: Path, tmp_path: Path) -> Run:
    """`rayrlhf run` on the (spoilt) world, for real: nothing but the bad input stops it."""

    def run(*overrides: str, command: str = "run") -> Done:
        settings = (f"run.output={tmp_path / 'runs'}", f"data.root={world}", *overrides)
        return rayrlhf_command(command, world / "config.yaml", *settings)

    return run


def assert_refused(done: Done, *parts: str) -> str:
    """Exit code 2 and a message, nothing else, that has all of `parts`."""
    assert done.code == 2, done
    assert "Traceback" not in done.out + done.err
    assert done.out == ""
    for part in parts:
        assert part in done.err
    assert re.match(r"(Config|Data|Model|Resource)Error: ", done.err)
    return done.err


def spoil(file: Path, line: int, text: str) -> None:
    """Put `text` in the place of that line, 1-based."""
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[line - 1] = text
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def record(file: Path, line: int, **fields: object) -> str:
    """That line's record with other fields."""
    found: dict[str, object] = json.loads(file.read_text(encoding="utf-8").splitlines()[line - 1])
    return json.dumps(found | fields)


# ---- the world as it is


def test_the_unspoilt_world_passes_every_check(run_world: Run, tmp_path: Path) -> None:
    done = run_world("--dry-run")
    assert (done.code, done.err) == (0, "")
    assert "would run: pretrain, sft, reward, ppo; done before: nothing" in done.out
    assert not (tmp_path / "runs").exists()


def test_the_unspoilt_models_pass_every_check(run_world: Run, models: Path) -> None:
    done = run_world(f"model={{path: {models / 'policy'}}}", f"reward.path={models / 'reward'}", "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert "would run: sft, ppo; done before: nothing" in done.out


# ---- config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pppo.steps=3", "config.yaml: pppo: unknown key; did you mean ppo?"),
        ("ppo.setps=3", "config.yaml: ppo.setps: unknown key; did you mean ppo.steps?"),
        ("cluster.value.rank=3", "config.yaml: cluster.value.rank: unknown key; did you mean cluster.value.ranks?"),
        ("ppo.steps=ten", "config.yaml: ppo.steps: found 'ten'; input should be a valid integer"),
        ("ppo.steps=0", "config.yaml: ppo.steps: found 0; input should be greater than or equal to 1"),
        ("ppo.clip=true", "config.yaml: ppo.clip: found True; input should be a valid number"),
        ("ppo.steps", "ConfigError: 'ppo.steps' is not an override"),
    ],
)
def test_a_key_or_value_that_cannot_be_is_refused(run_world: Run, override: str, message: str) -> None:
    assert_refused(run_world(override), message)


@pytest.mark.parametrize(
    ("override", "sections"),
    [
        ("world.module=mine.py", ("world.module is set", "world.name is not")),
        (
            "rollout.max_tokens=100",
            ("data.max_prompt_tokens 96", "rollout.max_tokens 100", "model.from_scratch.context"),
        ),
        ("cluster.policy.ranks=65", ("cluster.policy.ranks 65", "ppo.minibatch_size 64")),
        ("cluster.reward.gpus=1", ("reward.gpus is 1", "cluster.device is cpu")),
        ("data.prompts=[]", ("run.stages has ppo", "data.prompts is empty")),
    ],
)
def test_contradicting_sections_are_both_named(run_world: Run, override: str, sections: tuple[str, ...]) -> None:
    assert_refused(run_world(override), *sections)


def test_broken_yaml_is_named_by_file_and_line(run_world: Run, world: Path) -> None:
    spoil(world / "config.yaml", 3, "data: {")
    assert_refused(run_world(), f"ConfigError: {world / 'config.yaml'}:", "broken YAML")


def test_a_missing_config_file_suggests_the_nearest(rayrlhf_command: Run, world: Path) -> None:
    done = rayrlhf_command("run", world / "confg.yaml")
    assert_refused(done, f"{world / 'confg.yaml'}: no such config file", f"did you mean {world / 'config.yaml'}?")


def test_a_date_that_is_none_is_refused(run_world: Run) -> None:
    assert_refused(run_world("run.name=2024-13-45"), "run.name")


def test_an_unknown_transport_is_refused(run_world: Run) -> None:
    assert_refused(run_world("weights.transport=carrier_pigeon", "--dry-run"), "weights.transport", "carrier_pigeon")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ppo.advantage=grpo"], ["ppo.advantage", "no estimator 'grpo'", "gae, group_relative, leave_one_out"]),
        (["ppo.advantage=leave_one_out"], ["ppo.samples_per_prompt is 1", "set ppo.samples_per_prompt to 4 or more"]),
        (
            ["ppo.advantage=group_relative", "ppo.samples_per_prompt=4", "ppo.value_warmup_steps=1"],
            ["ppo.value_warmup_steps is 1", "no value model", "set it to 0"],
        ),
        (
            ["ppo.advantage=group_relative", "ppo.samples_per_prompt=4", "ppo.gamma=0.9"],
            ["ppo.gamma is 0.9", "ppo.advantage group_relative", "set it to 1.0"],
        ),
    ],
)
def test_an_estimator_that_cannot_work_is_refused(run_world: Run, overrides: list[str], words: list[str]) -> None:
    assert_refused(run_world(*overrides, "--dry-run"), *words)


def test_the_dry_run_of_a_group_estimator_places_no_value_model(run_world: Run) -> None:
    shown = run_world("ppo.advantage=group_relative", "ppo.samples_per_prompt=4", "--dry-run").out
    placement = shown[shown.index("placement") :]
    assert "reference" in placement
    assert "value" not in placement


# ---- rewards from elsewhere


FUNCTION = "def reward(prompts, responses):\n    raise AssertionError('nothing is scored before the run')\n"


def test_a_function_is_imported_and_its_ppo_needs_no_rankings_and_no_reward_model(run_world: Run, world: Path) -> None:
    (world / "mine.py").write_text(FUNCTION, encoding="utf-8")
    given = f"ppo.reward={{kind: function, function: '{world / 'mine.py'}:reward'}}"
    done = run_world(given, "data.rankings=[]", "data.heldout_rankings=[]", "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert "would run: pretrain, sft, ppo; done before: nothing" in done.out


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("{kind: function, function: 'nowhere.py:reward'}", ["ppo.reward.function: there is no file nowhere.py"]),
        ("{kind: function, function: 'os:path'}", ["ppo.reward.function: os has a module, no function: path"]),
        ("{kind: http}", ["ppo.reward: kind http needs url"]),
        ("{kind: http, url: 'gopher://a.example'}", ["ppo.reward: url is not one of a service"]),
        (
            "{kind: http, url: 'https://a.example/', token_variable: NO_SUCH_TOKEN}",
            ["ppo.reward.token_variable: the environment has no NO_SUCH_TOKEN", "export it"],
        ),
    ],
)
def test_a_source_of_rewards_that_cannot_work_is_refused(run_world: Run, reward: str, words: list[str]) -> None:
    assert_refused(run_world(f"ppo.reward={reward}"), *words)


def test_a_service_is_not_called_by_a_dry_run_and_its_token_not_shown(
    run_world: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "planted-Secret-55")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a dry run went to the network"))
    done = run_world(
        "ppo.reward={kind: http, url: 'https://rewards.example/', token_variable: REWARD_TOKEN}", "--dry-run"
    )
    assert (done.code, done.err) == (0, "")
    assert "would run: pretrain, sft, ppo" in done.out
    assert "planted-Secret-55" not in done.out


def test_an_ensemble_of_models_that_fit_is_fine(run_world: Run, models: Path) -> None:
    given = f"ppo.reward={{kind: ensemble, models: [{models / 'reward'}, {models / 'reward'}]}}"
    done = run_world(f"model={{path: {models / 'policy'}}}", given, "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert "would run: sft, ppo; done before: nothing" in done.out


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("foreign", ["its vocabulary", "does not fit the policy's"]),
        ("policy", ["has no reward head"]),
        ("short", ["is over the context of ppo.reward.models[1] 64"]),
        ("gone", ["no such model folder"]),
    ],
)
def test_a_member_of_an_ensemble_that_does_not_fit_is_named(
    run_world: Run, models: Path, member: str, words: list[str]
) -> None:
    given = f"ppo.reward={{kind: ensemble, models: [{models / 'reward'}, {models / member}]}}"
    assert_refused(
        run_world(f"model={{path: {models / 'policy'}}}", given, "--dry-run"), "ppo.reward.models[1]", *words
    )


def test_a_step_whose_rewards_come_from_elsewhere_cannot_be_verified(run_world: Run, world: Path) -> None:
    (world / "mine.py").write_text(FUNCTION, encoding="utf-8")
    given = f"ppo.reward={{kind: function, function: '{world / 'mine.py'}:reward'}}"
    assert_refused(run_world(given, "--verify-step", "1"), "ppo.reward.kind is function", "does not know")


# ---- files


def test_a_missing_data_file_is_named_with_its_key_and_the_nearest_file(run_world: Run, world: Path) -> None:
    done = run_world("data.prompts=[promts.jsonl]", "data.rankings=[nothing.jsonl]")
    assert_refused(
        done, f"data.prompts: no such file: {world / 'promts.jsonl'} (did you mean prompts.jsonl?)", "data.rankings: "
    )


def test_malformed_jsonl_is_named_by_file_and_line(run_world: Run, world: Path) -> None:
    spoil(world / "demonstrations.jsonl", 7, '{"prompt": "a", "response": ')
    assert_refused(run_world(), f"DataError: {world / 'demonstrations.jsonl'}:7: not JSON")


def test_a_malformed_line_one_hundred_is_named_too(run_world: Run, world: Path) -> None:
    file = world / "prompts.jsonl"
    file.write_text('{"prompt": "say hello"}\n' * 99 + "{\n", encoding="utf-8")
    assert_refused(run_world(), f"{file}:100: not JSON")


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_line_is_found_in_whichever_file_it_is(run_world: Run, world: Path, name: str) -> None:
    spoil(world / f"{name}.jsonl", 12, "[]")
    assert_refused(run_world(), f"DataError: {world / name}.jsonl:12: found list, expected a JSON object")


@pytest.mark.parametrize(
    ("name", "field"), [("prompts", "prompt"), ("demonstrations", "prompt"), ("demonstrations", "response")]
)
def test_an_empty_prompt_or_response_is_named_by_file_and_line(
    run_world: Run, world: Path, name: str, field: str
) -> None:
    file = world / f"{name}.jsonl"
    spoil(file, 5, record(file, 5, **{field: " \n"}))
    assert_refused(run_world(), f"DataError: {file}:5: `{field}` is empty")


def test_an_empty_response_in_a_ranking_is_named_by_file_line_and_place(run_world: Run, world: Path) -> None:
    file = world / "rankings.jsonl"
    spoil(file, 5, record(file, 5, responses=["a", ""], ranks=[1, 2]))
    assert_refused(run_world(), f"DataError: {file}:5: `responses[1]` is empty")


@pytest.mark.parametrize("name", ["rankings", "heldout_rankings"])
def test_a_ranking_whose_ranks_do_not_match_its_responses_is_refused(run_world: Run, world: Path, name: str) -> None:
    file = world / f"{name}.jsonl"
    spoil(file, 3, record(file, 3, responses=["a", "b", "c"], ranks=[1, 2]))
    assert_refused(run_world(), f"DataError: {file}:3: 3 `responses` but 2 `ranks`")


@pytest.mark.parametrize("rank", [0, 1.5, "1", True])
def test_a_rank_that_is_no_positive_whole_number_is_refused(run_world: Run, world: Path, rank: object) -> None:
    file = world / "rankings.jsonl"
    spoil(file, 3, record(file, 3, responses=["a", "b"], ranks=[1, rank]))
    assert_refused(run_world(), f"DataError: {file}:3: `ranks[1]` is {rank!r}, expected a positive whole number")


# ---- prompts over the limit


def long_prompts(world: Path) -> None:
    """Three short prompts, two long ones."""
    prompts = ["a", "b" * 400, "c", "d" * 300, "e"]
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (world / "prompts.jsonl").write_text(rows, encoding="utf-8")


def test_prompts_over_the_limit_are_refused_when_the_config_says_so(run_world: Run, world: Path) -> None:
    long_prompts(world)
    done = run_world("data.overlong_prompts=refuse")
    assert_refused(
        done, "DataError: 2 of 5 prompts are longer than 96 tokens", "data.max_prompt_tokens", "overlong_prompts"
    )


def test_prompts_over_the_limit_are_dropped_and_counted_by_default(run_world: Run, world: Path) -> None:
    long_prompts(world)
    assert run_world("--dry-run").code == 0
    config = load_config(world / "config.yaml", [f"data.root={world}"], {})
    prompts = Datasets(config, None).prompts
    assert prompts.counts == {"kept": 3, "dropped": 2, "truncated": 0}
    assert [prompt.prompt_id for prompt in prompts.tokens] == [0, 2, 4]


def test_a_limit_that_leaves_no_prompt_is_refused_even_with_drop(run_world: Run) -> None:
    assert_refused(run_world("data.max_prompt_tokens=2"), "are longer than 2 tokens", "nothing is left")


def test_held_out_demonstrations_that_are_all_too_long_are_dropped_like_others(world: Path) -> None:
    file = world / "demonstrations.jsonl"
    config = load_config(world / "config.yaml", [f"data.root={world}", "data.heldout_fraction=0.04"], {})
    # The split goes by prompt: those that even half of the prompts leave in training, and long ones until one is not.
    training, _ = split_by_prompt(read_demonstrations([file.name], world), 0.5, 0)
    short = [json.dumps({"prompt": r.prompt[0][1], "response": r.response}) for r in training]
    for number in range(1000):
        prompt = f"{number} " + "long " * 200
        rows = [*short, record(file, 1, prompt=prompt)]
        (world / "tried.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        _, held = split_by_prompt(read_demonstrations(["tried.jsonl"], world), 0.04, 0)
        if [h.prompt[0][1] for h in held] == [prompt]:
            break
    else:
        pytest.fail("no split holds out the long prompt alone")
    tried = config.model_copy(update={"data": config.data.model_copy(update={"demonstrations": ("tried.jsonl",)})})
    assert Datasets(tried, None).sft.heldout == []


# ---- models and tokenizers


@pytest.mark.parametrize("key", ["model.path", "sft.path", "reward.path"])
def test_a_missing_model_folder_is_named(run_world: Run, models: Path, tmp_path: Path, key: str) -> None:
    gone = tmp_path / "no" / "such" / "model"
    base = f"model={{path: {models / 'policy'}}}"
    assert_refused(run_world(base, f"{key}={gone}"), f"ModelError: {key}: {gone}: no such model folder")


def test_a_name_that_is_neither_a_folder_nor_to_be_had_from_the_hub_is_refused(run_world: Run) -> None:
    assert_refused(
        run_world("model={path: nobody/no-such-model}"), "nobody/no-such-model: cannot read the model's config"
    )


def test_a_folder_without_a_model_is_refused(run_world: Run, world: Path) -> None:
    assert_refused(
        run_world(f"model={{path: {world}}}"), f"ModelError: model.path: {world}: cannot read the model's config"
    )


def test_a_tokenizer_without_eos_is_refused(run_world: Run, models: Path, tmp_path: Path) -> None:
    folder = retokenized(models, tmp_path / "model", lambda tokenizer: setattr(tokenizer, "eos_token", None))
    assert_refused(
        run_world(f"model={{path: {folder}}}"), f"ModelError: model.path: {folder}: the tokenizer has no EOS token"
    )


def test_a_tokenizer_without_pad_is_refused(run_world: Run, models: Path, tmp_path: Path) -> None:
    folder = retokenized(models, tmp_path / "model", lambda tokenizer: setattr(tokenizer, "pad_token", None))
    assert_refused(
        run_world(f"model={{path: {folder}}}"), f"ModelError: model.path: {folder}: the tokenizer has no PAD token"
    )


@pytest.mark.parametrize("key", ["model.path", "sft.path", "reward.path"])
def test_a_tokenizer_whose_pad_is_its_eos_is_refused(run_world: Run, models: Path, tmp_path: Path, key: str) -> None:
    folder = retokenized(models, tmp_path / "model", lambda t: setattr(t, "pad_token", t.eos_token))
    done = run_world(f"model={{path: {models / 'policy'}}}", f"{key}={folder}")
    assert_refused(done, f"ModelError: {key}: {folder}: PAD and EOS are the same token, '<|endoftext|>'")


def test_a_model_whose_context_is_too_short_is_refused(run_world: Run, models: Path) -> None:
    done = run_world(f"model={{path: {models / 'policy'}}}", "rollout.max_tokens=33")
    assert_refused(done, "data.max_prompt_tokens 96 + rollout.max_tokens 33 is over the context of model.path 128")


def test_dropout_asked_of_llama_from_scratch_is_refused(run_world: Run) -> None:
    assert_refused(run_world("sft.dropout=0.2"), "sft.dropout is 0.2 but a llama model has no residual dropout", "gpt2")


def test_dropout_asked_of_a_given_llama_is_refused(run_world: Run, models: Path) -> None:
    done = run_world(f"model={{path: {models / 'policy'}}}", "sft.dropout=0.2")
    assert_refused(done, "sft.dropout is 0.2 but a llama model has no residual dropout")


def test_dropout_asked_of_gpt2_is_fine(run_world: Run) -> None:
    assert run_world("model.from_scratch.architecture=gpt2", "sft.dropout=0.2", "--dry-run").code == 0


def test_a_reward_model_with_another_vocabulary_is_refused(run_world: Run, models: Path) -> None:
    done = run_world(f"model={{path: {models / 'policy'}}}", f"reward.path={models / 'foreign'}")
    sizes = "its vocabulary (270 tokens) does not fit the policy's (320)"
    assert_refused(done, f"ModelError: reward.path {models / 'foreign'}: {sizes}")


def test_a_reward_model_for_a_policy_from_scratch_is_refused(run_world: Run, models: Path) -> None:
    assert_refused(
        run_world(f"reward.path={models / 'reward'}"), "reward.path and model.from_scratch contradict each other"
    )


def test_a_reward_model_with_fewer_embeddings_than_tokens_is_refused(run_world: Run, models: Path) -> None:
    done = run_world(f"model={{path: {models / 'policy'}}}", f"reward.path={models / 'small_embedding'}", "--dry-run")
    assert_refused(done, "small_embedding")


def test_a_reward_model_whose_context_is_too_short_is_refused(run_world: Run, models: Path) -> None:
    done = run_world(f"model={{path: {models / 'policy'}}}", f"reward.path={models / 'short'}", "--dry-run")
    assert_refused(done, "reward.path")


def test_a_reward_model_without_a_head_is_refused(run_world: Run, models: Path) -> None:
    done = run_world(f"model={{path: {models / 'policy'}}}", f"reward.path={models / 'policy'}", "--dry-run")
    assert_refused(done, "head")


# ---- what the options of sft need


def judged_by(folder: Path) -> str:
    return f"sft.select={{by: reward, reward_model: {folder}}}"


def test_a_reward_model_that_fits_may_judge_the_epochs(run_world: Run, models: Path) -> None:
    done = run_world(f"model={{path: {models / 'policy'}}}", judged_by(models / "reward"), "--dry-run")
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such model folder"),
        ("policy", "a LlamaForCausalLM with 2 labels has no reward head"),
        ("foreign", "its vocabulary (270 tokens) does not fit the policy's (320)"),
        ("small_embedding", "100 embeddings for 320 tokens"),
    ],
)
def test_a_model_that_cannot_judge_the_epochs_is_named_with_its_key(
    run_world: Run, models: Path, name: str, message: str
) -> None:
    done = run_world(f"model={{path: {models / 'policy'}}}", judged_by(models / name))
    assert_refused(done, "ModelError: sft.select.reward_model", str(models / name), message)


def test_a_judge_whose_context_is_too_short_for_the_responses_is_refused(run_world: Run, models: Path) -> None:
    done = run_world(f"model={{path: {models / 'policy'}}}", judged_by(models / "short"))
    assert_refused(
        done,
        "data.max_prompt_tokens 96 + sft.max_response_tokens 32 is over the context of sft.select.reward_model 64",
    )


def test_the_vocabulary_of_a_judge_is_compared_with_the_one_that_a_model_from_scratch_will_have(
    run_world: Run, models: Path
) -> None:
    assert_refused(run_world(judged_by(models / "foreign")), "sft.select.reward_model", "does not fit the policy's")


def test_epochs_that_no_held_out_demonstration_can_judge_are_refused(run_world: Run, world: Path) -> None:
    same = "".join(record(world / "demonstrations.jsonl", 1) + "\n" for _ in range(5))
    (world / "demonstrations.jsonl").write_text(same, encoding="utf-8")
    done = run_world("sft.select.by=heldout_loss")
    assert_refused(done, "DataError: sft.select.by is heldout_loss, but no held-out demonstration is left")


def test_text_to_mix_in_is_read_before_anything_starts(run_world: Run, world: Path, models: Path) -> None:
    given = (f"model={{path: {models / 'policy'}}}", "sft.pretrain_mix.coef=0.1")
    assert "text blocks" not in run_world(given[0], "--dry-run").out
    assert re.search(r"sft +kept .* text blocks [1-9]", run_world(*given, "--dry-run").out)
    (world / "text.jsonl").write_text('{"text": "short"}\n', encoding="utf-8")
    assert_refused(run_world(*given), "DataError: the pretraining text has", "less than one block of 128")


def test_blocks_of_text_that_are_over_the_models_context_are_refused(run_world: Run, models: Path) -> None:
    given = (f"model={{path: {models / 'policy'}}}", "rollout.max_tokens=33")
    assert_refused(
        run_world(*given, "sft.pretrain_mix.coef=0.1", command="sft"),
        "data.max_prompt_tokens 96 + rollout.max_tokens 33 is over the context of model.path 128",
    )
    assert run_world(*given, "--dry-run", command="sft").code == 0


def test_blocks_of_text_for_ppo_ptx_that_are_over_the_models_context_are_refused(run_world: Run, models: Path) -> None:
    """They are as long as sft's sequences even where sft is not run; a model with learned positions has no more."""
    given = [
        f"model={{path: {models / 'policy'}}}",
        f"sft.path={models / 'policy'}",
        f"reward.path={models / 'reward'}",
    ]
    given += ["rollout.max_tokens=16", "sft.max_response_tokens=33"]
    assert_refused(
        run_world(*given, "ppo.ptx.coef=1.0", command="ppo"),
        "data.max_prompt_tokens 96 + sft.max_response_tokens 33 is over the context of model.path 128",
    )
    assert run_world(*given, "--dry-run", command="ppo").code == 0


# ---- what eval and collect need


def evaluated(models: Path, *overrides: str) -> list[str]:
    """A config that evaluates given models on the prompts of PPO."""
    given = [
        f"model={{path: {models / 'policy'}}}",
        f"sft.path={models / 'policy'}",
        f"reward.path={models / 'reward'}",
    ]
    return [*given, "run.stages=[eval]", "data.heldout_prompts=[heldout_prompts.jsonl]", *overrides, "--dry-run"]


def test_questions_are_read_before_anything_starts(run_world: Run, world: Path, models: Path) -> None:
    given = evaluated(models, "data.multiple_choice=[multiple_choice.jsonl]")
    questions = [json.dumps({"prompt": "p", "choices": ["a", end], "answer": 0}) for end in ("b", "c", "long " * 200)]
    (world / "multiple_choice.jsonl").write_text("\n".join([*questions, questions[0]]) + "\n", encoding="utf-8")
    shown = run_world(*given).out
    assert re.search(r"^eval +kept 30, .*questions kept 3, questions dropped 1$", shown, flags=re.M)
    spoil(world / "multiple_choice.jsonl", 4, '{"prompt": "p", "choices": ["a", "b"], "answer": 2}')
    assert_refused(run_world(*given), f"DataError: {world / 'multiple_choice.jsonl'}:4: `answer` is 2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such model folder"),
        ("policy", "a LlamaForCausalLM with 2 labels has no reward head"),
        ("foreign", "its vocabulary (270 tokens) does not fit the policy's (320)"),
        ("short", "data.max_prompt_tokens 96 + rollout.max_tokens 32 is over the context of eval.reward_model 64"),
    ],
)
def test_a_held_out_reward_model_that_does_not_fit_is_refused(
    run_world: Run, models: Path, name: str, message: str
) -> None:
    done = run_world(*evaluated(models, f"eval.reward_model={models / name}"))
    assert_refused(done, "eval.reward_model", message)


def test_a_held_out_reward_model_that_fits_is_fine(run_world: Run, models: Path) -> None:
    done = run_world(*evaluated(models, f"eval.reward_model={models / 'reward'}"))
    assert (done.code, done.err) == (0, "")
    assert "would run: eval; done before: nothing" in done.out


def test_prompts_that_the_worlds_judge_does_not_know_are_refused(run_world: Run, world: Path, models: Path) -> None:
    given = evaluated(models, "world={name: instructions, size: 0.01}")
    assert run_world(*given).code == 0
    spoil(world / "heldout_prompts.jsonl", 3, '{"prompt": "write a poem"}')
    done = run_world(*given)
    assert_refused(done, "DataError: data.heldout_prompts: not an instruction of this world: 'write a poem'")
    assert "leave data.heldout_prompts empty for the prompts of world instructions" in done.err


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        (None, "summary.json: the run has left no summary, it is still going or was killed"),
        ("{", "summary.json: not the summary of a run"),
        ("[]", "summary.json: not the summary of a run"),
        ('{"stages": null}', "summary.json: not the summary of a run"),
        ('{"stages": {}}', "the run has no SFT model to compare with"),
    ],
)
def test_a_run_that_cannot_be_evaluated_says_why(
    rayrlhf_command: Run, tmp_path: Path, summary: str | None, message: str
) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG.replace("  prompts:", "  heldout_prompts: [p.jsonl]\n  prompts:"))
    if summary is not None:
        (run / "summary.json").write_text(summary)
    assert_refused(rayrlhf_command("eval", run), message)


@pytest.mark.parametrize(
    ("others", "settings", "message"),
    [
        (["nowhere"], [], "models/nowhere: no such folder"),
        (["reworded"], [], "its vocabulary (270 tokens) does not fit the policy's (320)"),
        (["wide"], [], "hidden_size is 64, and 32 in models/policy: the engines hold one shape"),
        ([], ["eval.reward_model={}/nowhere"], "eval.reward_model: "),
        ([], ["eval.reward_model={}/foreign"], "its vocabulary (270 tokens) does not fit the policy's (320)"),
        ([], ["reward.path={}/policy"], "a LlamaForCausalLM with 2 labels has no reward head"),
    ],
)
def test_models_that_cannot_be_compared_are_refused_before_anything_is_sampled(
    rayrlhf_command: Run, world: Path, models: Path, others: list[str], settings: list[str], message: str
) -> None:
    data = (f"data.heldout_prompts=[{world / 'heldout_prompts.jsonl'}]", "data.max_prompt_tokens=96")
    limits = ("rollout.max_tokens=16", "sft.max_response_tokens=16")
    given = [*(models / name for name in ("policy", *others)), *data, *limits, *(s.format(models) for s in settings)]
    assert_refused(rayrlhf_command("eval", *given, "--output", world / "eval"), message)


def test_an_arm_whose_estimator_cannot_work_is_refused(run_world: Run) -> None:
    given = ("ppo.advantage=leave_one_out", "ppo.samples_per_prompt=4", "ppo.arms={a: {}, b: {samples_per_prompt: 1}}")
    assert_refused(run_world(*given, "--dry-run"), "ppo.samples_per_prompt is 1")


@pytest.mark.parametrize("stage", ["collect", "eval"])
def test_a_head_size_is_refused_wherever_something_is_sampled(run_world: Run, stage: str) -> None:
    heads = ("model.from_scratch.hidden_size=64", "model.from_scratch.heads=4")
    given = ("world={name: instructions, size: 0.01}", "collect={}", f"run.stages=[pretrain, sft, {stage}]")
    assert_refused(run_world(*heads, *given, "--dry-run"), "heads of size 16 cannot be sampled")


def test_a_run_that_collects_reads_its_rankings_later(run_world: Run, world: Path) -> None:
    (world / "rankings.jsonl").write_text("[]\n", encoding="utf-8")  # what collect makes stands in for it
    given = (
        "world={name: instructions, size: 0.02}",
        "collect.heldout=5",
        "run.stages=[pretrain, sft, collect, reward]",
    )
    done = run_world(*given, "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^collect +kept 60, .*heldout kept 12$", done.out, flags=re.M)
    assert "\nreward " not in done.out.partition("would run")[2]


# ---- GPUs and CPUs: found once Ray has said what there is


def on_gpus(world: Path, *overrides: str) -> Config:
    return load_config(world / "config.yaml", ["cluster.device=cuda", *overrides], {})


def test_a_gpu_config_without_gpus_says_how_many_were_asked_for_and_found(world: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        check_resources(on_gpus(world, "rollout.engines=2"), [{"CPU": 64.0}])
    assert str(caught.value) == (
        "the config asks for 6 GPUs, the cluster has 0 "
        "(policy 1 x 1, reference 1 x 1, reward 1 x 1, value 1 x 1, rollout 2 x 1)\n"
        "  hint: set cluster.device=cpu"
    )


def test_a_gpu_config_with_too_few_gpus_says_what_to_lower(world: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        check_resources(on_gpus(world, "cluster.policy.ranks=2"), [{"CPU": 64.0, "GPU": 4.0}])
    assert "asks for 6 GPUs, the cluster has 4 (policy 2 x 1, " in caught.value.message
    assert caught.value.hint == "lower cluster.<role>.gpus"


def test_a_cluster_with_exactly_what_is_asked_for_is_enough(world: Path) -> None:
    check_resources(on_gpus(world), [{"CPU": 2.0, "GPU": 5.0}])
    with pytest.raises(ResourceError, match="asks for 2 CPUs, the cluster has 1"):
        check_resources(on_gpus(world), [{"CPU": 1.0, "GPU": 5.0}])


def test_a_supervised_stage_alone_asks_for_no_more_than_its_workers(world: Path) -> None:
    check_resources(on_gpus(world, "run.stages=[sft]"), [{"CPU": 2.0, "GPU": 1.0}])


# ---- stages asked for alone


def test_ppo_without_earlier_stages_names_the_missing_stage(run_world: Run) -> None:
    assert_refused(
        run_world(command="ppo"), "ConfigError: ppo starts from the sft model", "`rayrlhf sft` first", "sft.path"
    )


@pytest.mark.parametrize(("command", "parent"), [("sft", "pretrain"), ("reward", "sft"), ("dpo", "sft")])
def test_a_stage_without_its_parent_names_it(run_world: Run, command: str, parent: str) -> None:
    assert_refused(run_world(command=command), f"{command} starts from the {parent} model, and there is none")


def test_a_dry_run_of_dpo_shows_its_workers_and_what_became_of_its_rankings(
    run_world: Run, world: Path, models: Path
) -> None:
    given = (f"model={{path: {models / 'policy'}}}", f"sft.path={models / 'policy'}")
    done = run_world(*given, "--dry-run", command="dpo")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"│ dpo +│ train +│ +1 │", done.out)
    assert "policy" not in done.out.partition("\nplacement")[2]
    assert "would run: dpo; done before: nothing" in done.out
    ranks = [json.loads(line)["ranks"] for line in (world / "rankings.jsonl").read_text(encoding="utf-8").splitlines()]
    ties = sum(len(set(row)) == 1 for row in ranks)
    assert re.search(rf"^dpo +kept 30, .*all ties {ties}$", done.out, flags=re.M)


def test_dpo_in_a_chain_is_placed_with_the_supervised_stages(run_world: Run) -> None:
    done = run_world("run.stages=[pretrain, sft, dpo]", "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert "would run: pretrain, sft, dpo; done before: nothing" in done.out


def test_rankings_that_are_ties_throughout_leave_dpo_nothing_to_learn(run_world: Run, world: Path) -> None:
    file = world / "rankings.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    tied = [json.dumps(r | {"ranks": [1] * len(r["responses"])}) for r in lines]
    file.write_text("\n".join(tied) + "\n", encoding="utf-8")
    done = run_world("run.stages=[pretrain, sft, dpo]", "--dry-run")
    assert_refused(done, "DataError: data.rankings: every ranking is a tie")


def test_a_chain_with_a_gap_is_refused_before_its_first_stage(run_world: Run) -> None:
    assert_refused(run_world("run.stages=[pretrain, ppo]", "--dry-run"), "ppo starts from the sft model")


# ---- the command itself


def test_help_is_shown_and_exits_0(rayrlhf_command: Run) -> None:
    done = rayrlhf_command("--help")
    assert (done.code, done.err) == (0, "")
    for command in ("run", "pretrain", "sft", "reward", "dpo", "ppo"):
        assert f" {command} " in done.out


@pytest.mark.parametrize("command", ["run", "pretrain", "sft", "reward", "dpo", "ppo"])
def test_each_command_has_help_of_its_own(rayrlhf_command: Run, command: str) -> None:
    done = rayrlhf_command(command, "--help")
    assert done.code == 0
    assert "--dry-run" in done.out


@pytest.mark.parametrize("arguments", [(), ("run",), ("bogus",), ("run", "--bogus", "x.yaml")])
def test_a_command_that_cannot_be_parsed_exits_2_and_shows_the_usage(
    rayrlhf_command: Run, arguments: tuple[str, ...]
) -> None:
    done = rayrlhf_command(*arguments)
    assert done.code == 2
    assert "Usage: " in done.out + done.err
    assert "Traceback" not in done.out + done.err


def test_a_dry_run_of_the_smallest_run_shows_config_and_every_role_and_starts_nothing(
    rayrlhf_command: Run, tmp_path: Path
) -> None:
    done = rayrlhf_command("run", ROOT / "configs" / "tiny.yaml", f"run.output={tmp_path}", "--dry-run")
    assert (done.code, done.err) == (0, "")
    for role in ("train", "policy", "reference", "reward", "value", "rollout"):
        assert re.search(rf"│ {role} +│ +1 │", done.out)
    assert "learning_rate: 0.0001" in done.out
    assert "needs at once: 2 CPUs, 0 GPUs" in done.out
    assert not (tmp_path / "tiny").exists()


def test_the_config_that_a_dry_run_prints_can_be_read_again(run_world: Run, world: Path, tmp_path: Path) -> None:
    name = "-".join(["prompts"] * 12) + ".jsonl"
    (world / "prompts.jsonl").rename(world / name)
    printed = run_world(f"data.prompts=[{name}]", "--dry-run").out.partition("\nplacement")[0]
    again = tmp_path / "printed.yaml"
    again.write_text(printed, encoding="utf-8")
    assert load_config(again, (), {}).data.prompts == (name,)


def test_ctrl_c_exits_130_and_says_so(rayrlhf_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rayrlhf.stages.run, "run", interrupted)
    done = rayrlhf_command("run", ROOT / "configs" / "tiny.yaml")
    assert done.code == 130
    assert "interrupted" in done.err


def test_an_output_folder_that_is_a_file_is_refused(rayrlhf_command: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = rayrlhf_command("run", ROOT / "configs" / "tiny.yaml", f"run.output={tmp_path / 'file'}", "--dry-run")
    assert_refused(done, str(tmp_path / "file"))


def test_a_head_size_that_the_cpu_engine_cannot_sample_is_refused(run_world: Run) -> None:
    done = run_world("model.from_scratch.hidden_size=64", "model.from_scratch.heads=4", "--dry-run")
    assert_refused(
        done, "heads of size 16 cannot be sampled with cluster.device cpu", "hidden_size / heads must be one of 32"
    )


def test_sigterm_exits_143_and_says_so(rayrlhf_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked_to_end(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(rayrlhf.stages.run, "run", asked_to_end)
    try:
        done = rayrlhf_command("run", ROOT / "configs" / "tiny.yaml")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.code == 143
    assert "asked to end" in done.err


def test_a_resumed_run_is_not_verified(rayrlhf_command: Run) -> None:
    done = rayrlhf_command("run", ROOT / "configs" / "tiny.yaml", "--resume", "--verify-step", "2")
    assert done.code == 2
    assert "--resume and --verify-step contradict each other" in done.err


@pytest.mark.parametrize("command", ["run", "pretrain", "sft", "reward", "dpo", "ppo"])
def test_every_command_that_learns_can_go_on(rayrlhf_command: Run, command: str) -> None:
    done = rayrlhf_command(command, "--help")
    assert done.code == 0
    assert "--resume" in done.out


def test_a_disk_that_is_full_anywhere_ends_a_run_with_one_message(
    rayrlhf_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*of: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/demo/metrics.jsonl")

    monkeypatch.setattr("rayrlhf.stages.run.run", full)
    done = rayrlhf_command("run", Path("configs/tiny.yaml").resolve())
    assert done.code == 1
    assert "No space left on device: 'runs/demo/metrics.jsonl'" in " ".join(done.err.split())
    assert "--resume" in done.err
    assert "Traceback" not in done.err
