"""A world's files in the keys of `data` that name none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrlhf.config import Config
from rayrlhf.config.data import SOURCE_FIELDS
from rayrlhf.errors import ConfigError
from rayrlhf.stages.ppo import judge_of
from rayrlhf.stages.world import with_world


def config(output: Path, data: dict[str, object] | None = None, **world: object) -> Config:
    tree = {"model": {"path": "org/name"}, "run": {"output": str(output)}, "data": data or {}, "world": world}
    return Config.model_validate(tree)


def test_every_empty_key_gets_its_file_and_a_named_one_keeps_its_own(tmp_path: Path) -> None:
    own = {"prompts": ["mine.jsonl"], "rankings": ["a.jsonl", "b.jsonl"]}
    filled = with_world(config(tmp_path, own, name="instructions", size=0.01))
    for name in SOURCE_FIELDS:
        sources = getattr(filled.data, name)
        if name in own:
            assert list(sources) == own[name]
        else:
            (path,) = map(Path, sources)
            assert path.is_absolute()
            assert path.name == f"{name}.jsonl"
            assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])


def test_worlds_of_another_seed_or_size_are_written_beside(tmp_path: Path) -> None:
    worlds = [with_world(config(tmp_path, name="instructions", seed=s, size=z)) for s, z in ((0, 0.01), (1, 0.01))]
    worlds.append(with_world(config(tmp_path, name="instructions", seed=0, size=0.02)))
    texts = [Path(world.data.text[0]).read_bytes() for world in worlds]
    assert len(set(texts)) == 3
    assert {path.name for path in (tmp_path / "worlds").iterdir()} == {
        "instructions-0-0.01",
        "instructions-1-0.01",
        "instructions-0-0.02",
    }


def test_without_a_world_nothing_changes_and_nothing_is_written(tmp_path: Path) -> None:
    files = {name: [f"{name}.jsonl"] for name in ("text", "demonstrations", "rankings", "prompts")}
    plain = config(tmp_path, files)
    assert with_world(plain) == plain
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_world_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"world\.name: no world 'moon'"):
        with_world(config(tmp_path, name="moon"))
    assert list(tmp_path.iterdir()) == []


def test_actors_find_the_worlds_file_from_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").touch()
    monkeypatch.chdir(tmp_path)
    judge = judge_of(config(tmp_path, name="mine", module="own.py"), {3: "p"})
    assert judge is not None
    assert (judge.world, judge.module, judge.prompts) == ("mine", str(tmp_path / "own.py"), {3: "p"})
    named = judge_of(config(tmp_path, name="mine", module="package.own"), {})
    assert named is not None
    assert named.module == "package.own"
    assert judge_of(config(tmp_path, {n: ["f"] for n in SOURCE_FIELDS}), {}) is None
