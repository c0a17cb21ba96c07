"""Configs that no one meant: a message of ours or a config, soon, whatever the file or the command line holds."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from rayrlhf.config import Config, config_from, dump_config, load_config
from rayrlhf.errors import ConfigError, RayRLHFError

ROOT = Path(__file__).parents[3]
BASE: dict[str, Any] = {
    "run": {"name": "mine"},
    "model": {"from_scratch": {"hidden_size": 32, "layers": 1, "heads": 1, "context": 512}},
    "data": {name: ["x.jsonl"] for name in ("text", "demonstrations", "rankings", "prompts")},
}
# Of one config, on a machine that has other work; most take a hundredth of it.
DEADLINE_S = 10.0


def outcome(make: Callable[[], Config]) -> Config | RayRLHFError:
    """What a person would get. Any exception that is not ours goes through, and fails the test."""
    start = perf_counter()
    found: Config | RayRLHFError
    try:
        found = make()
    except ConfigError as error:
        found = error
    told = dump_config(found) if isinstance(found, Config) else str(found)
    assert len(told.encode("utf-8")) < 100_000
    if isinstance(found, Config):
        again = config_from(YAML(typ="safe", pure=True).load(told), (), {})
        assert dump_config(again) == told
    assert perf_counter() - start < DEADLINE_S
    return found


def keys_of(section: Any, prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{name}"
        found.append(dotted)
        if hasattr(field.annotation, "model_fields"):
            found += keys_of(field.annotation, f"{dotted}.")
    return found


KEYS = [
    *keys_of(Config),
    "collect.fewest",
    "eval.temperature",
    "model.from_scratch.vocab_size",
    "ppo.arms.a",
    "new.key",
]
# Where the config itself asks for little: there the junk gets far.
OPEN = [
    *("deepspeed.extra.x", "deepspeed.extra", "deepspeed.extra.zero_optimization", "cluster.value.resources.x"),
    *("ppo.arms.a", "ppo.arms.a.clip", "ppo.arms.a.kl", "model.chat_template", "data.prompts", "data.root"),
    *("run.output", "tracking.project", "world.name", "world.module", "sft.path", "cluster.address"),
]
NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, -(10**400), 1e308, 5e-324, float("inf"), float("nan"), -0.0]
)
TEXTS = st.sampled_from(
    ["", " ", "\x00", "\x1b[2J", "\ud800", "\u202e", "a" * 5000, "\n", "../../x", "~root/x", "%s{0}"]
)
LEAVES = st.one_of(
    NUMBERS, TEXTS, st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4),
    st.just(date(2024, 1, 1)), st.just({1, "a"}), st.just(()),
)  # fmt: skip
KEY_LIKE = st.one_of(st.sampled_from(["a", "from_scratch", "coef"]), st.integers(), st.none(), st.text(max_size=4))
JUNK = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEY_LIKE, inner, max_size=3), max_leaves=8
)


def planted(tree: Any, dotted: str, value: Any) -> Any:
    node, (*path, last) = tree, dotted.split(".")
    for part in path:
        child = node.get(part)
        node[part] = child if isinstance(child, dict) else {}
        node = node[part]
    node[last] = value
    return tree


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plants=st.lists(st.tuples(st.sampled_from(KEYS) | st.sampled_from(OPEN), JUNK), min_size=1, max_size=3))
def test_junk_in_any_key_is_a_message_or_a_config(plants: list[tuple[str, Any]]) -> None:
    tree = deepcopy(BASE)
    for dotted, value in plants:
        planted(tree, dotted, value)
    assert isinstance(outcome(lambda: config_from(tree, (), {})), Config | ConfigError)


@pytest.mark.parametrize("dotted", KEYS)
def test_each_key_alone_takes_or_refuses_each_kind_of_value(dotted: str) -> None:
    values = (None, True, -1, 10**400, 1e308, float("nan"), "\x00\ud800", [], {}, [[]], {1: {None: 2}}, {"a": []})
    refused = 0
    for value in values:
        found = outcome(lambda value=value: config_from(planted(deepcopy(BASE), dotted, value), (), {}))  # type: ignore[misc]
        refused += isinstance(found, ConfigError)
    # No key takes both a dict with such keys and a list of a list.
    assert 1 <= refused <= len(values)


PIECES = st.sampled_from(
    ["run", "model", "ppo", ":", ": ", "\n", "\n  ", "- ", "[", "]", "{", "}", ",", "&a ", "*a",
     "!!python/name:os.system ",
     "!!float x", "!!int ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!t ", "'", '"', "|", ">", "#",
     "%YAML 1.1\n", "---\n", "...\n", "\t", "? ", "<<: ", "0x", "1e", "9" * 50, ".inf", "2024-13-45", "~", "null",
     "\x00", "\ufeff",
     "\u2028", "\U0001f600", "@", "`"]
)  # fmt: skip


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(pieces=st.lists(PIECES | st.text(max_size=5), max_size=25), spot=st.integers(0, 400))
def test_text_that_is_hardly_yaml_is_a_message_or_a_config(tmp_path: Path, pieces: list[str], spot: int) -> None:
    whole = (ROOT / "configs" / "tiny.yaml").read_text()
    for text in ("".join(pieces), whole[:spot] + "".join(pieces) + whole[spot:]):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        found = outcome(lambda path=path: load_config(path, (), {}))  # type: ignore[misc]
        assert isinstance(found, Config) or "mine.yaml" in str(found)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(key=st.sampled_from(KEYS) | st.text(max_size=8), pieces=st.lists(PIECES | st.text(max_size=5), max_size=8))
def test_an_override_that_is_hardly_one_is_a_message_or_a_config(key: str, pieces: list[str]) -> None:
    junk = "".join(pieces)
    found = outcome(lambda: config_from(deepcopy(BASE), [f"{key}={junk}", f"{junk}{key}"[:40]], {}))
    assert isinstance(found, Config | ConfigError)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases stand for more than 100000 values"),
        (BOMB.replace("a11:", "deepspeed:\n  extra:\n    x:"), "aliases stand for more than 100000 values"),
        ("data: {prompts: &a [*a]}", "or hold themselves"),
        ("deepspeed: {extra: &a {x: *a}}", "or hold themselves"),
        ("deepspeed:\n  extra:\n    x: &a {y: *a}", "or hold themselves"),
        ("run: {seed: 1, seed: 2}", "mine.yaml:1: broken YAML"),
        ("run:\n\tname: x", "mine.yaml:2: broken YAML"),
        ("run: !!python/object/apply:os.system ['touch executed']", "mine.yaml:1: broken YAML"),
        ("run: !!python/name:os.system", "mine.yaml:1: broken YAML"),
        ("a: 1\n---\nb: 2", "broken YAML"),
        ("[" * 5000, "broken YAML"),
        ("{a: " * 5000, "broken YAML"),
        ("a:\n" + "".join(f"{' ' * i}- \n" for i in range(1, 1200)), "broken YAML"),
        ("x: !!int a", "broken YAML"),
        ("x: !!float [1]", "broken YAML"),
        ("x: !!timestamp y", "broken YAML"),
        ("x: !!binary \u00e9", "broken YAML"),
        ("? [a, b]\n: c", "mine.yaml: "),
        ("? {a: b}\n: c", "broken YAML"),
        ("1: 2", "mine.yaml: 1: "),
        ("run: {1: 2}", "mine.yaml: run.1: "),
        ("run: {seed: 0x" + "f" * 5000 + "}", "run.seed: found "),
        ("run: {seed: " + "9" * 5000 + "}", "broken YAML"),
        ("run: {name: " + "x" * 200_000 + "}", "run.name: found 'xxx"),
        ("run: {name: " + "x" * (1 << 20) + "}", "a config has at most 1048576"),
        ("run: {name: artifacts}", "run.name: artifacts is the folder that all runs share"),
        ("run: {name: ../x}", "run.name: found '../x'"),
        ("run: {name: 'x\\n'}", "run.name: found "),
        ("run: {name: .hidden}", "run.name: found '.hidden'"),
        ("ppo: {steps: 10000000000000000000}", "ppo.steps: found 10000000000000000000; input should be less than"),
    ],
)  # fmt: skip
def test_what_was_found_once_stays_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    found = outcome(lambda: load_config(path, (), {}))
    assert isinstance(found, ConfigError)
    assert words in found.message
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("key", OPEN)
@pytest.mark.parametrize(
    "value", ["\ud800", b"\xff", {"\ud800": 1}, {"a": [b"\x00"]}, "a\x85b", "\u2028", date(2024, 1, 1)]
)
def test_what_cannot_be_written_down_is_refused_and_the_rest_comes_back(key: str, value: Any) -> None:
    found = outcome(lambda: config_from(planted(deepcopy(BASE), key, value), (), {}))
    if value in ("a\x85b", "\u2028") and key in ("deepspeed.extra.x", "model.chat_template", "run.output"):
        assert isinstance(found, Config)


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"run: \xc3\x28", b"\x00" * 100, b"\x1f\x8b\x08", bytes(range(256))])
def test_a_file_that_is_no_text_is_a_message(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    assert isinstance(outcome(lambda: load_config(path, (), {})), ConfigError)


def test_aliases_that_repeat_a_section_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(BASE, file)
    with path.open("a") as file:
        file.write("cluster:\n  policy: &role {threads: 2}\n  value: *role\n")
    found = outcome(lambda: load_config(path, (), {}))
    assert isinstance(found, Config)
    assert (found.cluster.policy.threads, found.cluster.value.threads) == (2, 2)
