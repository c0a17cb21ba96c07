"""Paths that no file system could look up, and sections nested without end: refused as a config is read, by the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config import Config, config_from, dump_config, load_config
from rayrlhf.errors import ConfigError

SOURCES = [
    *("text", "demonstrations", "ranking_prompts", "rankings", "heldout_rankings", "prompts", "heldout_prompts"),
    "multiple_choice",
]
# The key, how its value is made of a path, and what else has to be set for it to be read.
PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "run.output": ("{}", {}),
    "data.root": ("{}", {}),
    **{f"data.{name}": ("{}.jsonl", {}) for name in SOURCES},
    "model.path": ("{}", {"model.from_scratch": None}),
    "model.chat_template": ("{}", {}),
    "sft.path": ("{}", {}),
    "reward.path": ("{}", {}),
    "sft.select.reward_model": ("{}", {"sft.select.by": "reward"}),
    "eval.reward_model": ("{}", {}),
    "ppo.reward.function": ("{}.py:score", {"ppo.reward.kind": "function"}),
    "world.module": ("{}.py", {"world.name": "mine"}),
    "plan.hardware": ("{}.yaml", {}),
    "plan.shapes.policy": ("{}", {}),
}
LISTS = {**{f"data.{name}": "{}.jsonl" for name in SOURCES}, "ppo.reward.models": "{}"}
BAD = {
    "a" * 300: "holds at most 255 bytes",
    "\u00e9" * 150: "holds at most 255 bytes",
    "a/" * 1500 + "a": "a path of more than 2000 bytes",
    "a\x00b": "no path holds a NUL: take it out",
    "~nosuchuser/x": "~nosuchuser is nobody's home folder on this machine: write the whole path",
}
NAMES = ["long", "long in bytes", "deep", "nul", "nobody's"]


def tree(**keys: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "model": {"from_scratch": {"hidden_size": 32, "layers": 1, "heads": 1, "context": 512}},
        "data": {name: ["x.jsonl"] for name in ("text", "demonstrations", "rankings", "prompts")},
    }
    for dotted, value in keys.items():
        *sections, last = dotted.split(".")
        node = made
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return made


def refusal(**keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from(tree(**keys), (), {}, "mine.yaml")
    return str(caught.value)


@pytest.mark.parametrize("key", PLACES)
@pytest.mark.parametrize(("path", "words"), BAD.items(), ids=NAMES)
def test_a_path_that_cannot_be_looked_up_is_refused_by_its_key(key: str, path: str, words: str) -> None:
    form, others = PLACES[key]
    message = refusal(**{**others, key: form.format(path)})
    assert message.startswith(f"mine.yaml: {key}")
    assert words in message
    assert len(message) < 1000


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize(("path", "words"), BAD.items(), ids=NAMES)
def test_in_a_list_its_place_is_named_too(key: str, path: str, words: str) -> None:
    others = {"ppo.reward.kind": "ensemble"} if key == "ppo.reward.models" else {}
    message = refusal(**{**others, key: ["good.jsonl", LISTS[key].format(path)]})
    assert message.startswith(f"mine.yaml: {key}.1: found ")
    assert words in message


@pytest.mark.parametrize("root", ["a" * 300, "a\x00b", "~nosuchuser/x"])
def test_the_data_folder_of_the_environment_is_checked_like_one_of_the_config(root: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml: data\.root: found "):
        config_from(tree(), (), {"RAYRLHF_HUMAN_DATA": root}, "mine.yaml")


@pytest.mark.parametrize("name", ["a" * 300 + ".yaml", "a/" * 3000 + "a.yaml", "a\x00b.yaml", "~nosuchuser/a.yaml"])
def test_a_config_file_that_cannot_be_looked_up_is_a_message(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(name, (), {})
    assert name.replace("\x00", "\\x00")[:100] in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_longest_names_that_a_file_system_takes_are_taken() -> None:
    longest = "a" * 255
    found = config_from(
        tree(**{"run.output": f"{longest}/{longest}", "data.prompts": "b" * 249 + ".jsonl", "sft.path": None,
                "ppo.reward.kind": "function", "ppo.reward.function": "c" * 252 + ".py:" + "score" * 20}),
        (), {},
    )  # fmt: skip
    assert found.run.output == Path(f"{longest}/{longest}")
    assert found.data.prompts == ("b" * 249 + ".jsonl",)


def test_a_home_folder_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    keys = {"run.output": "~/runs", "data.root": "~", "data.prompts": "~/x.jsonl", "eval.reward_model": "~root/judge"}
    found = config_from(tree(**keys), (), {})
    assert (found.run.output, found.data.root) == (Path("/somebody/runs"), Path("/somebody"))
    assert (found.data.prompts, found.eval.reward_model) == (("~/x.jsonl",), "~root/judge")


@pytest.mark.parametrize("name", ["org/name", "org/name:train[:10%]", "org/name:train+test"])
def test_a_hub_name_is_taken_as_it_is(name: str) -> None:
    assert config_from(tree(**{"data.prompts": name}), (), {}).data.prompts == (name,)


@pytest.mark.parametrize("text", ["{{ messages }}" + "a" * 5000, "~nosuchuser {{ x }}", "{{ x }}" + "a/" * 3000])
def test_a_chat_template_of_any_length_is_text_where_it_has_a_brace(text: str) -> None:
    assert config_from(tree(**{"model.chat_template": text}), (), {}).model.chat_template == text


def test_long_text_that_is_no_template_is_told_what_it_was_taken_for() -> None:
    message = refusal(**{"model.chat_template": "Answer the question below. " * 20})
    assert message.startswith("mine.yaml: model.chat_template: found 'Answer the question below. Answer")
    assert message.endswith("(a template in Jinja would have a { in it, so this is taken for the name of a file)")


# ---- nesting


def test_an_override_of_endless_sections_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from(tree(), ["a." * 500 + "b=1"], {}, "mine.yaml")
    assert str(caught.value) == (
        "mine.yaml: a: nested more than 50 deep\n"
        "  hint: take sections out, of the file or of an override: the config's own lie 4 deep"
    )


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"x": value}
    return value


@pytest.mark.parametrize("depth", [49, 300, 900])
def test_deep_nesting_is_refused_where_any_key_would_be_taken(depth: int) -> None:
    assert refusal(**{"deepspeed.extra": nested(depth)}).startswith("mine.yaml: deepspeed: nested more than 50 deep")


def test_nesting_that_sums_up_over_a_key_and_its_value_or_over_aliases_is_refused() -> None:
    value = "{a: " * 30 + "1" + "}" * 30
    with pytest.raises(ConfigError, match="deepspeed: nested more than 50 deep"):
        config_from(tree(), ["deepspeed.extra." + "a." * 30 + f"b={value}"], {})
    shared = nested(30)
    inner: Any = shared
    for _ in range(30):
        inner = {"y": inner}
    assert "deepspeed: nested more than 50 deep" in refusal(**{"deepspeed.extra": {"a": shared, "b": inner}})


def test_what_nests_less_is_taken_and_comes_back() -> None:
    found = config_from(tree(**{"deepspeed.extra": nested(48)}), (), {})
    assert isinstance(found, Config)
    assert found.deepspeed.extra == nested(48)
    assert "x:" in dump_config(found)
