"""The world that docs/worlds.md shows is one: it registers, and writes every file of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rayrlhf.worlds.base import create_world
from rayrlhf.worlds.files import write_world

PAGE = (Path(__file__).parents[3] / "docs" / "worlds.md").read_text(encoding="utf-8")


def test_the_example_of_the_page_writes_a_world_whose_judge_knows_right_from_wrong(tmp_path: Path) -> None:
    module = tmp_path / "sums.py"
    code = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)[0]
    module.write_text(code, encoding="utf-8")
    world = create_world("sums", str(module))
    files = write_world(world, tmp_path / "world", seed=0, size=0.1)
    demonstrations = [json.loads(line) for line in files["demonstrations"].read_text().splitlines()]
    assert len(demonstrations) == 60
    assert world.gold("what is 20 plus 3?", "please: 23.") == 1.0
    assert world.gold("what is 20 plus 3?", "23.") == 0.8
    assert world.gold("what is 20 plus 3?", "please: 24.") == 0.2


def test_the_example_of_the_page_is_short(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)[0]
    body = code.split("@register_world", maxsplit=1)[1].splitlines()
    assert len([line for line in body if line.strip()]) <= 35
