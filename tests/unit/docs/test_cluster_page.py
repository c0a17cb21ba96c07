"""cluster/README.md: its commands parse, and the files it speaks of are those that are rendered."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from typer.main import get_command

from rayrlhf.cli import app
from rayrlhf.launch.manifests import KINDS

ROOT = Path(__file__).parents[3]
# The page begins with a copy of the example.
COPIED = "cluster/mine.yaml", "cluster/values.yaml"
PAGE = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")


def test_every_command_of_ours_on_the_page_parses() -> None:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S) for line in block.splitlines()]
    ours = ("rayrlhf", ".venv/bin/rayrlhf")
    commands = [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] in ours]
    assert len(commands) >= 3
    group = get_command(app)
    for words in commands:
        context = group.commands[words[1]].make_context(words[1], words[2:])  # type: ignore[attr-defined]
        if words[1] != "manifests":
            continue
        values = str(context.params["values"]).replace(*COPIED)
        assert (ROOT / values).is_file()
        assert set(context.params["kinds"] or ()) <= set(KINDS)


def test_every_file_that_the_page_uses_is_rendered_and_every_rendered_one_is_explained() -> None:
    files = {name for names in KINDS.values() for name in names}
    assert set(re.findall(r"manifests/([\w.-]+\.\w+)", PAGE)) <= files
    assert all(f"`{name}`" in PAGE for name in files)


def test_links_on_the_page_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE):
        assert (ROOT / "cluster" / target).exists(), target
