"""Worlds by name: the built-in one, a user's own, and what is said of one that cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrlhf.errors import ConfigError
from rayrlhf.worlds.base import create_world
from rayrlhf.worlds.files import write_world

OWN = '''
"""Numbers in order."""
from rayrlhf.worlds.base import Choice, Sizes, World, register_world


@register_world("numbers")
class Numbers(World):
    sizes = Sizes(text=5, demonstrations=40, rankings=20, heldout_rankings=8, ranking_prompts=20, prompts=60,
                  heldout_prompts=10, multiple_choice=6)
    weights = {"right": 0.75, "ends": 0.25}

    def document(self, rng):
        start = rng.randrange(500)
        return ", ".join(map(str, range(start, start + 5)))

    def prompt(self, rng, heldout):
        return f"what comes after {rng.randrange(500) * 2 + heldout}?"

    def demonstration(self, rng, prompt):
        number = int(prompt[17:-1])
        return str(number + rng.randrange(4)) + rng.choice((".", "")), "a clerk"

    def flags(self, prompt, response, finished):
        return {"right": response.rstrip(".") == str(int(prompt[17:-1]) + 1), "ends": finished and response[-1:] == "."}

    def cloze(self, rng):
        return Choice("1, 2,", ("3", "4"), 0)
'''


def test_a_world_in_a_file_of_the_users_registers_and_is_written(tmp_path: Path) -> None:
    module = tmp_path / "own.py"
    module.write_text(OWN, encoding="utf-8")
    world = create_world("numbers", str(module))
    assert world.gold("what comes after 6?", "7.") == 1.0
    assert world.gold("what comes after 6?", "7", finished=False) == 0.75
    assert world.kind("what comes after 6?") == ""
    paths = write_world(world, tmp_path / "files", seed=0)
    records = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}
    assert len(records) == 8
    assert records["multiple_choice"] == [{"prompt": "1, 2,", "choices": ["3", "4"], "answer": 0}] * 6
    held_out = [record["prompt"] for name in ("heldout_prompts", "heldout_rankings") for record in records[name]]
    assert {int(prompt[17:-1]) % 2 for prompt in held_out} == {1}
    assert len(set(held_out)) == 18


def test_a_world_in_a_module_that_can_be_imported_registers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_alone.py").write_text(OWN.replace('"numbers"', '"imported"'), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert create_world("imported", "mine_alone").sizes.prompts == 60


def test_two_worlds_of_a_name_are_told_apart_by_their_module(tmp_path: Path) -> None:
    for folder, worth, rest in (("a", "0.75", "0.25"), ("b", "0.5", "0.5")):
        (tmp_path / folder).mkdir()
        own = OWN.replace('"ends": 0.25', f'"ends": {rest}').replace("0.75", worth)
        (tmp_path / folder / "own.py").write_text(own, encoding="utf-8")
    assert create_world("numbers", str(tmp_path / "a" / "own.py")).weights["right"] == 0.75
    assert create_world("numbers", str(tmp_path / "b" / "own.py")).weights["right"] == 0.5


def test_an_unknown_world_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"world\.name: no world 'moon'") as caught:
        create_world("moon")
    assert "instructions" in caught.value.hint
    assert "world.module" in caught.value.hint


def test_a_module_that_registers_another_world_is_named(tmp_path: Path) -> None:
    module = tmp_path / "own.py"
    module.write_text(OWN, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"world\.name: no world 'moon'") as caught:
        create_world("moon", str(module))
    assert "numbers" in caught.value.hint
    assert str(module) in caught.value.hint


def test_a_module_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"world\.module: there is no file .*gone\.py"):
        create_world("instructions", str(tmp_path / "gone.py"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def :", "invalid syntax"),
        ("import no_such_module_here", "no_such_module_here"),
        ("World", "'World'"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "broken.py").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"world\.module: .*broken\.py cannot be imported") as caught:
        create_world("instructions", str(tmp_path / "broken.py"))
    assert reason in caught.value.message


def test_a_world_whose_methods_are_missing_says_which(tmp_path: Path) -> None:
    text = (
        "from rayrlhf.worlds.base import World, register_world\n@register_world('bare')\nclass Bare(World):\n    pass\n"
    )
    (tmp_path / "bare.py").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"world\.name: 'bare' \(Bare\) cannot be made: TypeError.*demonstration"):
        create_world("bare", str(tmp_path / "bare.py"))


def test_a_module_name_that_nothing_has_says_so() -> None:
    with pytest.raises(ConfigError, match=r"world\.module: no\.such\.module cannot be imported"):
        create_world("instructions", "no.such.module")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ('weights = {"right": 75, "ends": 25}', r"the weights of 'numbers' \(right 75, ends 25\) are not shares of 1"),
        ('weights = {"right": 1.5, "ends": -0.5}', "are not shares of 1"),
        ("weights = {}", "are not shares of 1"),
        ("", "'numbers' \\(Numbers\\) has no `weights`"),
    ],
)
def test_a_world_whose_gold_would_be_no_share_is_refused(tmp_path: Path, weights: str, message: str) -> None:
    module = tmp_path / "own.py"
    module.write_text(OWN.replace('weights = {"right": 0.75, "ends": 0.25}', weights), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        create_world("numbers", str(module))
