from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.worlds.base import World, create_world
from rayrlhf.worlds.files import write_world

Records = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def world() -> World:
    return create_world("instructions")


@pytest.fixture(scope="session")
def paths(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every file of the built-in world in its full size."""
    return write_world(world, tmp_path_factory.mktemp("world") / "new" / "folder", seed=0)


@pytest.fixture(scope="session")
def files(paths: dict[str, Path]) -> Records:
    return {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, path in paths.items()
    }
