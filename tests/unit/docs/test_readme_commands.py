"""Every command that the README shows exists and parses; every file it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click import Command
from typer.main import get_command

from rayrlhf.cli import app
from rayrlhf.config import load_config
from rayrlhf.launch.manifests import load_values

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shown_commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    words = [shlex.split(line, comments=True) for line in lines]
    # A leading NAME=value sets the environment.
    return [[w for i, w in enumerate(ws) if i or not re.match(r"^[A-Z_]+=", w)] for ws in words]


COMMANDS = shown_commands()


def test_the_readme_shows_the_two_commands_first() -> None:
    assert COMMANDS[:2] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("words", [c for c in COMMANDS if c[0] == "make"], ids=" ".join)
def test_each_make_target_exists(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert words[1] in targets


@pytest.mark.parametrize("words", [c for c in COMMANDS if c[0] == "rayrlhf"], ids=" ".join)
def test_each_rayrlhf_command_parses_and_its_config_loads(words: list[str]) -> None:
    group = get_command(app)
    command: Command = group.commands[words[1]]  # type: ignore[attr-defined]
    context = command.make_context(words[1], words[2:])
    if words[1] in ("report", "eval"):
        assert context.params["runs" if words[1] == "report" else "subjects"]
        return
    if words[1] == "manifests":
        assert load_values(ROOT / context.params["values"])
        return
    if words[1] == "audit":
        assert context.params["run"]
        return
    config = load_config(ROOT / context.params["config"], context.params["overrides"] or [], environ={})
    assert config.stages()


def test_no_other_program_is_shown() -> None:
    assert {c[0] for c in COMMANDS} == {"make", "rayrlhf"}


def test_every_file_of_the_annotated_tree_exists() -> None:
    tree = README.split("```\nrayrlhf/\n")[1].split("```")[0]
    folders = re.findall(r"^  ([a-z_]+)/ ", tree, flags=re.M)
    assert {p.name for p in (ROOT / "rayrlhf").iterdir() if (p / "__init__.py").exists()} == set(folders)
    for name in re.findall(r"([a-z_]+\.(?:py|toml|yaml))", tree):
        assert list(ROOT.glob(f"rayrlhf/**/{name}")) or (ROOT / "configs" / name).exists(), name


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
