"""Values and configs for the tests of manifests, and the rendered files read back."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from rayrlhf.config import Config, config_from
from rayrlhf.launch.manifests import render
from rayrlhf.launch.values import Values

__all__ = ["EXAMPLE", "ROOT", "config", "linter", "read", "rendered", "values"]

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "cluster" / "values.yaml"


def values(**changes: Any) -> Values:
    """Two CPU nodes and a command, unless changed."""
    return Values.model_validate({"command": ["true"], "workers": {"cpu": {"cpus": 2, "nodes": 2}}} | changes)


def config(**sections: Any) -> Config:
    tree = {
        "model": {"path": "org/model"},
        "data": {name: [f"{name}.jsonl"] for name in ("demonstrations", "rankings", "prompts")},
    }
    return config_from(tree | sections, environ={})


def rendered(name: str, made: Values | None = None, run: Config | None = None) -> str:
    return render(made or values(), run)[name]


def read(text: str) -> Any:
    """As Kubernetes and Ray read it: YAML, every key once."""
    return YAML(typ="safe", pure=True).load(text)


def linter(name: str, package: str) -> str:
    """Its path; the test is skipped where there is none."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"no `{name}` command ({package})")
    return found
