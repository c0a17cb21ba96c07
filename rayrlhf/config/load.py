"""YAML plus `section.key=value` overrides -> Config, with errors a person can act on; and back to YAML."""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.representer import SafeRepresenter

from rayrlhf.config.limits import UNREADABLE, check_size, check_text, parse, shown
from rayrlhf.config.root import Config
from rayrlhf.config.secrets import masked, refuse_secrets
from rayrlhf.errors import ConfigError

__all__ = [
    "DATA_ROOT_VARIABLE",
    "config_from",
    "dump_config",
    "dump_yaml",
    "load_config",
    "load_section",
    "read_yaml",
    "validated",
]

S = TypeVar("S", bound=BaseModel)

DATA_ROOT_VARIABLE = "RAYRLHF_HUMAN_DATA"


def load_config(path: Path | str, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Config:
    """Read `path`, apply dotted overrides left to right, validate.

    Raises:
        ConfigError: naming file and line, or the dotted path, what was found and the nearest valid name.
    """
    path = Path(path)
    return config_from(read_yaml(path), overrides, environ, str(path))


def config_from(
    tree: dict[str, Any],
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    source: str = "the config",
) -> Config:
    """As `load_config`, of a tree that is there already; `source` is what messages call it."""
    for override in overrides:
        _apply_override(tree, override)
    _fill_data_root(tree, environ.get(DATA_ROOT_VARIABLE))
    check_size(tree, source)
    check_text(tree, source)
    refuse_secrets(tree, environ, source)
    return validated(Config, tree, source)


def load_section(path: Path | str, model: type[S]) -> S:
    """A YAML file that is no run's config, as strict and with the same messages.

    Raises:
        ConfigError: as `load_config`.
    """
    return validated(model, read_yaml(Path(path)), str(path))


def validated(model: type[S], tree: Any, source: str) -> S:
    """`tree` as this section; ConfigError names each key that is wrong, what was found and the nearest valid name."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, source, model)) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML: every default written out."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_yaml(tree: Mapping[str, Any]) -> str:
    stream = io.StringIO()
    _yaml().dump(tree, stream)
    return stream.getvalue()


class _Representer(SafeRepresenter):
    """ruamel writes U+0085 as it is, and reads it back as the end of a line."""

    def represent_str(self, data: str) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\x85" in data else None)


_Representer.add_representer(str, _Representer.represent_str)


def _yaml() -> YAML:
    # ruamel follows YAML 1.2, where 9e-6 is a number; PyYAML (1.1) reads a string.
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML 1.2 file; ConfigError where it is missing or broken."""
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # it is too long, or in a folder that may not be looked into
        raise ConfigError(f"{shown(str(path))}: cannot be looked up: {error.strerror}", "name another file") from None
    if is_folder:
        raise ConfigError(f"{path}: a folder, not a config file", "name a YAML file in it")
    if not is_file:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1, cutoff=0.4)
        raise ConfigError(f"{path}: no such config file", f"did you mean {path.parent / near[0]}?" if near else "")
    try:
        tree = parse(_yaml(), path)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else "?"
        raise ConfigError(
            f"{path}:{line}: broken YAML: {error.problem}", "check indentation, colons and quotes"
        ) from None
    except UNREADABLE as error:
        raise ConfigError(f"{path}: broken YAML: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections (`run:`, `model:`, ...), found a {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"{shown(masked(override))} is not an override", "write section.key=value, for example ppo.steps=10"
        )
    try:
        value = _yaml().load(text)
    except UNREADABLE:
        raise ConfigError(f"{dotted}: cannot read {shown(masked(text))} as YAML", "quote it: key='\"text\"'") from None
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {key} is a value, not a section")
        node = child
    node[keys[-1]] = value


def _fill_data_root(tree: dict[str, Any], root: str | None) -> None:
    """The environment's folder where the config names neither a folder nor a world that makes its own."""
    world = tree.get("world")
    if not root or (isinstance(world, dict) and world.get("name")):
        return
    data = tree.setdefault("data", {})
    if isinstance(data, dict) and data.get("root") is None:
        data["root"] = root


def _explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    return "\n".join(f"{where}: {_explain_one(dict(item), model)}" for item in error.errors())


def _explain_one(item: dict[str, Any], model: type[BaseModel]) -> str:
    loc = [str(part) for part in item["loc"]]
    dotted = ".".join(loc) or "config"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(loc[-1], _fields_at(loc[:-1], model), n=1, cutoff=0.5)
        suggestion = ".".join([*loc[:-1], near[0]]) if near else f"one of {', '.join(_fields_at(loc[:-1], model))}"
        return f"{dotted}: unknown key; did you mean {suggestion}?"
    if item["type"] == "missing":
        return f"{dotted}: missing"
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        return f"{dotted}: {message}" if loc else message
    found = "null" if item["input"] is None else shown(item["input"])
    if item["type"] == "model_type":  # a value where a section is
        return f"{dotted}: found {found}; it is a section: set one of {', '.join(_fields_at(loc, model))} in it"
    return f"{dotted}: found {found}; {item['msg'][:1].lower()}{item['msg'][1:]}"


def _fields_at(loc: Sequence[str], model: type[BaseModel]) -> list[str]:
    """Names valid in the section of `model` that `loc` points at."""
    parts = iter(loc)
    for part in parts:
        if part not in model.model_fields:
            return []
        annotation = model.model_fields[part].annotation
        if get_origin(annotation) is dict:  # sections by names of the user's own
            next(parts, None)
        candidates = (annotation, *get_args(annotation))
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return sorted(model.model_fields)
