"""`rayrlhf plan`: from a file to a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from rayrlhf.config import Config, load_config
from rayrlhf.errors import ConfigError
from rayrlhf.planning.assumptions import Assumptions, assumptions_for
from rayrlhf.planning.form import is_form, read_form, workload_of_form
from rayrlhf.planning.hardware import Hardware, hardware_named
from rayrlhf.planning.plan import Plan, make_plan
from rayrlhf.planning.reading import workload_of
from rayrlhf.planning.show import show_assumptions, show_plan

__all__ = ["assumed", "plan_config", "plan_file"]

FALLBACK = {"cuda": "h100-80g", "cpu": "cpu"}


def plan_file(
    path: Path, overrides: Sequence[str], hardware: str | None, nodes: int | None, assume: Sequence[str]
) -> Plan:
    """The plan of a config, or of a form that is filled in.

    Raises:
        ConfigError, ModelError: what the file or the options say cannot be used.
    """
    own = assumed(assume)
    if not is_form(path):
        return plan_config(load_config(path, overrides), hardware, nodes, own)
    if overrides:
        raise ConfigError(f"{path} is a form: it takes no section.key=value", "change the file, or use --assume")
    form = read_form(path)
    device = hardware_named(hardware or form.hardware)
    if not device.is_gpu:
        raise ConfigError(f"{path}: a form is planned on GPUs, {device.name} is none", "take another --hardware")
    if form.placement is None:
        raise ConfigError(f"{path}: placement is missing", "fill it in")
    known = _assumptions(device, {f"{path}: assumptions": form.assumptions, "--assume": own})
    return make_plan(workload_of_form(form, form.placement), device, known, nodes or form.nodes)


def plan_config(
    config: Config, hardware: str | None = None, nodes: int | None = None, assume: Mapping[str, float] | None = None
) -> Plan:
    device = hardware_named(hardware or config.plan.hardware or FALLBACK[config.cluster.device])
    if device.is_gpu != (config.cluster.device == "cuda"):
        raise ConfigError(
            f"hardware {device.name} is a {device.device.kind} and cluster.device is {config.cluster.device}",
            f"set cluster.device={'cuda' if device.is_gpu else 'cpu'}, or take other hardware",
        )
    known = _assumptions(device, {"plan.assume": config.plan.assume, "--assume": assume or {}})
    return make_plan(workload_of(config, known), device, known, nodes or config.plan.nodes)


def print_plan(console: Console, plan: Plan, as_json: bool) -> None:
    if as_json:
        console.print(json.dumps(plan.as_json()), highlight=False, markup=False, emoji=False, soft_wrap=True)
        return
    show_assumptions(console, plan)
    show_plan(console, plan)


def assumed(options: Sequence[str]) -> dict[str, float]:
    """`name=value` options; ConfigError for others."""
    values = {}
    for option in options:
        name, equals, text = option.partition("=")
        try:
            values[name.strip()] = float(text)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"--assume {option!r}: expected name=number", "for example --assume mfu_train=0.45")
    return values


def _assumptions(device: Hardware, changes: Mapping[str, Mapping[str, float]]) -> Assumptions:
    known = assumptions_for(device.device.kind).changed(device.assumptions, f"measured: {device.name}")
    for source, values in changes.items():
        known = known.changed(values, source)
    return known
